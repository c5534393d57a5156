//! The kernel table is true: naga accepts every module, each entry point has the bindings and
//! workgroup that the table says, and all stay inside WebGPU's default limits.

use std::collections::BTreeSet;

use manyhands_shaders::wgsl::{
    COUNTERS, FAMILIES, Family, Id, KERNELS, Kernel, TABLES, UNIFORM_BYTES, Workgroup,
};
use naga::AddressSpace;
use naga::back::PipelineConstants;
use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

const STORAGE_BUFFERS_MAX: usize = 8;
const WORKGROUP_BYTES_MAX: u32 = 16 << 10;
const INVOCATIONS_MAX: u32 = 256;

fn validate(family: &Family) -> (naga::Module, ModuleInfo) {
    let source = family.source();
    let module = naga::front::wgsl::parse_str(&source)
        .unwrap_or_else(|e| panic!("{}: {}", family.name, e.emit_to_string(&source)));
    let info = Validator::new(ValidationFlags::all(), Capabilities::default())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{}: {}", family.name, e.emit_to_string(&source)));
    (module, info)
}

fn expected_bindings(kernel: &Kernel) -> BTreeSet<u32> {
    let mut out: BTreeSet<u32> = kernel.bindings.iter().copied().collect();
    assert_eq!(out.len(), kernel.bindings.len(), "{} lists a binding twice", kernel.name());
    out.insert(0);
    out.extend(kernel.counts.then_some(COUNTERS));
    out.extend(kernel.looks_up.then_some(TABLES));
    out
}

/// Breaks if a kernel is not valid WGSL or the table does not describe it.
#[test]
fn wgsl_every_kernel_is_valid_and_as_the_table_says() {
    let mut listed = 0;
    for (index, family) in FAMILIES.iter().enumerate() {
        let (module, info) = validate(family);
        for (i, entry) in module.entry_points.iter().enumerate() {
            let name = format!("{}.{}", family.name, entry.name);
            let kernel = KERNELS
                .iter()
                .find(|k| k.family == index && k.entry == entry.name)
                .unwrap_or_else(|| panic!("{name} is not in the table"));
            listed += 1;
            let mut found = BTreeSet::new();
            let mut storage = 0;
            for (handle, variable) in module.global_variables.iter() {
                if info.get_entry_point(i)[handle].is_empty() {
                    continue;
                }
                let Some(binding) = &variable.binding else { continue };
                assert!(found.insert(binding.binding), "{name} uses a binding twice");
                let size = module.types[variable.ty].inner.size(module.to_ctx());
                match variable.space {
                    AddressSpace::Uniform => assert!(size as usize <= UNIFORM_BYTES, "{name}"),
                    AddressSpace::Storage { .. } => storage += 1,
                    space => panic!("{name}: {space:?}"),
                }
            }
            assert_eq!(found, expected_bindings(kernel), "bindings of {name}");
            assert!(storage <= STORAGE_BUFFERS_MAX, "{name} uses {storage} storage buffers");
        }
    }
    assert_eq!(listed, KERNELS.len(), "every kernel of the table exists");
}

/// Breaks if a workgroup size of the table would be refused by a device with default limits.
#[test]
fn wgsl_every_workgroup_is_within_default_limits() {
    for family in &FAMILIES {
        let (module, info) = validate(family);
        for entry in &module.entry_points {
            let has_lanes =
                module.overrides.iter().any(|(_, o)| o.name.as_deref() == Some("LANES"));
            for lanes in [1.0, 8.0, 64.0, 256.0] {
                let mut constants = PipelineConstants::default();
                if has_lanes {
                    constants.insert("LANES".into(), lanes);
                }
                let stage = Some((naga::ShaderStage::Compute, entry.name.as_str()));
                let (fixed, info) = process_overrides(&module, &info, stage, &constants)
                    .unwrap_or_else(|e| panic!("{}.{}: {e}", family.name, entry.name));
                let e = fixed.entry_points.iter().position(|e| e.name == entry.name).unwrap();
                let invocations: u32 = fixed.entry_points[e].workgroup_size.iter().product();
                assert!(invocations <= INVOCATIONS_MAX, "{}.{}", family.name, entry.name);
                let shared: u32 = fixed
                    .global_variables
                    .iter()
                    .filter(|(h, v)| {
                        v.space == AddressSpace::WorkGroup
                            && !info.get_entry_point(e)[*h].is_empty()
                    })
                    .map(|(_, v)| fixed.types[v.ty].inner.size(fixed.to_ctx()))
                    .sum();
                assert!(shared <= WORKGROUP_BYTES_MAX, "{}.{}: {shared}", family.name, entry.name);
            }
        }
    }
}

/// Breaks if [`Id`] and the table fall out of step, or a fixed workgroup has another size.
#[test]
fn wgsl_ids_name_the_kernels_of_the_table() {
    assert_eq!(Id::BenchF32 as usize + 1, KERNELS.len());
    for kernel in &KERNELS {
        let (module, _) = validate(&FAMILIES[kernel.family]);
        let entry = module.entry_points.iter().find(|e| e.name == kernel.entry).unwrap();
        match kernel.workgroup {
            Workgroup::Fixed(n) => assert_eq!(entry.workgroup_size, [n, 1, 1]),
            Workgroup::Lanes => assert!(entry.workgroup_size_overrides.is_some()),
        }
    }
    assert_eq!(Id::MatmulProduct.kernel().name(), "matmul.product");
    assert_eq!(Id::RmsnormForward.kernel().name(), "rmsnorm.forward");
    assert_eq!(Id::AttentionBackwardKeyGradient.kernel().name(), "attention_backward.key_gradient");
    assert_eq!(Id::LogitsStats.kernel().name(), "logits.stats");
}
