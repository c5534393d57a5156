//! Each primitive of `x1.wgsl` equals the Rust one, over wide random inputs and the extremes.

mod gpu_support;

use gpu_support::{Device, Random, with_device};
use manyhands_shaders::tables::{EXP2, SIGMOID};
use manyhands_shaders::wgsl::{FAMILIES, Id, TABLES, UNIFORM_BYTES};
use manyhands_shaders::x1::{self, LIM};

/// Inputs a primitive: a third random, the rest of mixed magnitudes and extremes.
const COUNT: usize = 6144;

/// A primitive: its name, how inputs are brought into its domain, and its twin as two words.
type Primitive = (&'static str, fn([u32; 4]) -> [u32; 4], fn([u32; 4]) -> [u32; 2]);

fn s(x: u32) -> i32 {
    x.cast_signed()
}

fn u(x: i32) -> u32 {
    x.cast_unsigned()
}

fn one(x: i32) -> [u32; 2] {
    [u(x), 0]
}

fn two(x: i64) -> [u32; 2] {
    wide(x.cast_unsigned())
}

fn wide(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | (u64::from(high) << 32)
}

fn limit(x: u32) -> u32 {
    u(s(x).clamp(-LIM, LIM))
}

fn block_sum(x: u32) -> i32 {
    s(x).clamp(-(1 << 24), 1 << 24)
}

fn shift(x: u32, low: i32, high: i32) -> u32 {
    u(low + (x % (high - low + 1).cast_unsigned()).cast_signed())
}

/// `x * 2^-s` to nearest even, written from the definition in 128 bits.
fn nearest_even(x: i128, s: u32) -> i128 {
    let (q, r) = (x >> s, x & ((1 << s) - 1));
    let half = if s == 0 { i128::MAX } else { 1 << (s - 1) };
    q + i128::from(r > half || (r == half && q & 1 == 1))
}

const PRIMITIVES: [Primitive; 19] = [
    (
        "rne",
        |i| [limit(i[0]), shift(i[1], 0, 70), 0, 0],
        |i| one(x1::rne(s(i[0]).into(), s(i[1])) as i32),
    ),
    (
        "mulsh",
        |i| [i[0], i[1], shift(i[2], 0, 63), 0],
        |i| {
            let x = x1::mulsh_wide(s(i[0]), s(i[1]), s(i[2]));
            [u(x1::sat(x)), x1::clamps(x) as u32]
        },
    ),
    (
        "mulsh_wide",
        |i| [i[0], i[1], shift(i[2], 0, 63), 0],
        |i| two(x1::mulsh_wide(s(i[0]), s(i[1]), s(i[2]))),
    ),
    (
        "flush",
        |i| [u(block_sum(i[0])), shift(i[1], -40, 40), 0, 0],
        |i| one(x1::flush(s(i[0]), s(i[1]))),
    ),
    (
        "flush4",
        |i| [u(block_sum(i[0])), shift(i[1], -40, 40), 0, 0],
        |i| {
            let (d, e) = (s(i[0]), s(i[1]));
            let f = [x1::flush(d, e), x1::flush(d, e + 1), x1::flush(-d, e), x1::flush(d, -e)];
            [u(f[0] ^ f[1]), u(f[2] ^ f[3])]
        },
    ),
    (
        "exp2n",
        |i| [i[0] >> (1 + i[2] % 12), shift(i[1], 14, 24), 0, 0],
        |i| one(x1::exp2n(s(i[0]), s(i[1]))),
    ),
    ("sigmoid", |i| [u(s(i[0]) >> (i[1] % 16)), 0, 0, 0], |i| one(x1::sigmoid(s(i[0])))),
    ("isqrt", |i| i, |i| [x1::isqrt(i[0]), 0]),
    ("bl", |i| i, |i| one(x1::bl(s(i[0])))),
    ("mul64", |i| i, |i| wide(u64::from(i[0]) * u64::from(i[1]))),
    ("add64", |i| i, |i| wide(join(i[0], i[1]).wrapping_add(join(i[2], i[3])))),
    ("shl64", |i| i, |i| wide(join(i[0], i[1]) << (i[2] & 63))),
    ("shr64", |i| i, |i| wide(join(i[0], i[1]) >> (i[2] & 63))),
    (
        "bl64, less64",
        |i| i,
        |i| {
            let (a, b) = (join(i[0], i[1]), join(i[2], i[3]));
            [u(x1::bl64(a)), u32::from(a < b)]
        },
    ),
    ("rne64", |i| i, |i| wide(nearest_even(join(i[0], i[1]).into(), i[2] & 63) as u64)),
    (
        "rne64_signed",
        |i| i,
        |i| two(nearest_even(join(i[0], i[1]).cast_signed().into(), i[2] & 63) as i64),
    ),
    (
        "sat64",
        |i| [i[0], u(s(i[1]) >> (i[2] % 33).min(31)), 0, 0],
        |i| {
            let x = join(i[0], i[1]).cast_signed();
            [u(x1::sat(x)), x1::clamps(x) as u32]
        },
    ),
    ("sat", |i| i, |i| [u(x1::sat(s(i[0]).into())), x1::clamps(s(i[0]).into()) as u32]),
    ("neg64, wide", |i| i, |i| two(-i64::from(s(i[0])))),
];

/// Words that lie where rounding, carries and clamps change.
fn inputs(random: &mut Random) -> Vec<[u32; 4]> {
    let edges = [0, 1, 2, 3, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x3fff_ffff, 0x4000_0000];
    let edges =
        edges.into_iter().chain([0xffff, 0x10000, 0xc000_0001, 1 << 24, 15, 16, 31, 32, 63]);
    let edges: Vec<u32> = edges.collect();
    let word = |i: usize, random: &mut Random| {
        let r = random.next();
        match i % 3 {
            0 => r as u32,
            1 => u(s(r as u32) >> (r >> 59)),
            _ => edges[(r >> 8) as usize % edges.len()],
        }
    };
    (0..COUNT).map(|i| std::array::from_fn(|k| word(i + k * (i / 3), random))).collect()
}

/// Runs one primitive on the device.
fn evaluate(
    d: &Device,
    pipeline: &wgpu::ComputePipeline,
    op: u32,
    inputs: &[[u32; 4]],
) -> Vec<u32> {
    use wgpu::BufferUsages as Usage;
    let buffer = |size: usize, usage| {
        d.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: size as u64,
            usage,
            mapped_at_creation: false,
        })
    };
    let upload = |data: &[u8], usage| {
        let b = buffer(data.len(), usage | Usage::COPY_DST);
        d.queue.write_buffer(&b, 0, data);
        b
    };
    let mut uniform = [0_u32; UNIFORM_BYTES / 4];
    uniform[..2].copy_from_slice(&[inputs.len() as u32, op]);
    let tables = [&EXP2[..], &SIGMOID].concat();
    let results = buffer(inputs.len() * 8, Usage::STORAGE | Usage::COPY_SRC);
    let bound = [
        (0, upload(bytemuck::cast_slice(&uniform), Usage::UNIFORM)),
        (TABLES, upload(bytemuck::cast_slice(&tables), Usage::STORAGE)),
        (3, upload(bytemuck::cast_slice(inputs), Usage::STORAGE)),
        (4, results.clone()),
    ];
    let entries: Vec<_> = bound
        .iter()
        .map(|(binding, b)| wgpu::BindGroupEntry {
            binding: *binding,
            resource: b.as_entire_binding(),
        })
        .collect();
    let group = d.device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &entries,
    });
    let staging = buffer(inputs.len() * 8, Usage::MAP_READ | Usage::COPY_DST);
    let mut encoder = d.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(inputs.len().div_ceil(64) as u32, 1, 1);
    }
    encoder.copy_buffer_to_buffer(&results, 0, &staging, 0, None);
    d.queue.submit([encoder.finish()]);
    staging.slice(..).map_async(wgpu::MapMode::Read, |r| r.expect("mapped"));
    d.device.poll(wgpu::PollType::wait_indefinitely()).expect("polled");
    bytemuck::pod_collect_to_vec(&staging.slice(..).get_mapped_range().expect("mapped")[..])
}

/// Breaks if a primitive of the kernels rounds, carries, clamps or counts otherwise than its twin.
#[test]
fn primitives_wide_inputs_equal_twin() {
    with_device(|d| {
        let module = d.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("x1_probe"),
            source: wgpu::ShaderSource::Wgsl(FAMILIES[Id::X1Probe.kernel().family].source().into()),
        });
        let pipeline = d.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some(Id::X1Probe.kernel().entry),
            compilation_options: Default::default(),
            cache: None,
        });
        let mut random = Random(7);
        for (op, (name, domain, twin)) in PRIMITIVES.iter().enumerate() {
            let inputs: Vec<_> = inputs(&mut random).into_iter().map(domain).collect();
            let got = evaluate(d, &pipeline, op as u32, &inputs);
            let got: Vec<[u32; 2]> = got.as_chunks::<2>().0.to_vec();
            let expected: Vec<[u32; 2]> = inputs.iter().map(|&i| twin(i)).collect();
            let bad: Vec<usize> = (0..inputs.len()).filter(|&i| got[i] != expected[i]).collect();
            if let Some(&i) = bad.first() {
                panic!(
                    "{name}: input {i} {:x?}: twin {:x?}, gpu {:x?} ({} of {} differ)",
                    inputs[i],
                    expected[i],
                    got[i],
                    bad.len(),
                    inputs.len()
                );
            }
            assert!(expected.iter().any(|e| *e != [0, 0]), "{name} is trivially zero");
        }
    });
}
