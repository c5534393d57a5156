//! What the GPU engine cannot do is an error at the next read: never a panic, never a wrong bit.

mod gpu_support;

use gpu_support::{open, with_device};
use manyhands_core::engine::gpu::{Gpu, Profile};
use manyhands_core::engine::{Batch, Engine, EngineError, Tiles};
use manyhands_core::model::config::ModelConfig;
use pollster::block_on;

fn constants() -> manyhands_core::engine::Constants {
    ModelConfig::preset("nano", 41, 64).expect("a preset").constants()
}

/// Runs some of everything; what comes back does not matter.
fn use_engine(gpu: &Gpu) -> Result<Vec<i32>, EngineError> {
    let w = gpu.weight(&Tiles::quantize(&vec![0.5; 41 * 96], 41, 96));
    let gain = gpu.gain(&[4096; 96]);
    let h = gpu.embed(&w, &Batch::sequences([&[1, 2, 3][..]]));
    let (x, _) = gpu.rmsnorm(&h, &gain);
    let [y] = gpu.linear(&x, [&w]);
    block_on(gpu.read(&y))
}

/// Breaks if a reset driver takes the volunteer's program down with it.
#[test]
fn device_lost_is_an_error_at_every_read() {
    with_device(|_| {
        let d = open().expect("a second device");
        assert!(use_engine(&d.gpu).is_ok());
        let gradient = d.gpu.gradient(3, 3);
        d.device.destroy();
        let lost = |e: &EngineError| matches!(e, EngineError::DeviceLost(_));
        assert!(use_engine(&d.gpu).is_err_and(|e| lost(&e)));
        assert!(block_on(d.gpu.read_gradient(&gradient)).is_err_and(|e| lost(&e)));
        assert!(block_on(d.gpu.take_saturations()).is_err_and(|e| lost(&e)));
    });
}

/// Breaks if a batch that does not fit is cut off, or stops the program.
#[test]
fn buffer_over_the_limit_is_an_error_with_its_size() {
    with_device(|d| {
        let profile = Profile::Software { lanes: 8 };
        let gpu = Gpu::new(d.device.clone(), d.queue.clone(), profile, constants());
        let gpu = gpu.expect("buffers fit");
        let limit = d.device.limits().max_storage_buffer_binding_size;
        let rows = usize::try_from(limit / 4 / 1000).expect("fits") + 1000;
        let gradient = gpu.gradient(rows, 1000);
        let needed = rows as u64 * 4000;
        let error = EngineError::BufferTooLarge { needed, limit };
        assert_eq!(block_on(gpu.read_gradient(&gradient)), Err(error.clone()));
        assert_eq!(use_engine(&gpu), Err(error));
    });
}
