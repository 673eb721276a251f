//! `tenpak devices`: what can multiply on this machine.

use clap::Args;

use super::report::{plain, table};
use super::{Context, Outcome};
use crate::report::devices::{Adapter, Cuda, Devices};

/// List what this machine can multiply with: the CPU's instruction sets, graphics devices, and NVIDIA's devices
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(context: &mut Context<'_>) -> Outcome {
    let report = Devices::new();
    if context.json() {
        context.print_json(&report);
        return Outcome::Done;
    }
    let sets = |names: &[&str]| if names.is_empty() { "-".to_owned() } else { names.join(" ") };
    let cpu = &report.cpu;
    context.line(format!("cpu: {} threads; instruction sets, the best one last:", cpu.threads));
    let rows = [("float32", &cpu.float32), ("bfloat16", &cpu.bfloat16), ("int8", &cpu.int8)];
    context.line(table(&["arithmetic", "sets"], rows.map(|(name, names)| vec![name.to_owned(), sets(names)]), 2));
    context.line("");
    match &report.wgpu {
        None => context.line("graphics devices: this build knows none; build it with `--features wgpu`"),
        Some(adapters) if adapters.is_empty() => context.line(
            "graphics devices: none was found; install a Vulkan driver, or a software one such as Debian's \
             mesa-vulkan-drivers",
        ),
        Some(adapters) => {
            let head = ["device", "name", "type", "by", "driver", "f16", "subgroups", "kept", "binding", "workgroup"];
            context.line(table(&head, adapters.iter().map(row), 8));
            context.line("");
            context.line(
                "f16: halves in shaders; subgroups: their sizes; kept: compiled kernels on disk; binding: MiB that a \
                 kernel sees at once; workgroup: KiB that its threads share",
            );
            if adapters.iter().any(|adapter| adapter.kind == "cpu") {
                context.line("type cpu: a driver that computes on the processor, slower than the device cpu itself");
            }
        }
    }
    context.line("");
    match &report.cuda {
        None => context.line("CUDA devices: this build knows none; build it with `--features cuda`"),
        Some(cuda) => print_cuda(context, cuda),
    }
    Outcome::Done
}

fn print_cuda(context: &mut Context<'_>, cuda: &Cuda) {
    if !cuda.devices.is_empty() {
        let rows = cuda.devices.iter().map(|device| {
            let memory = (device.memory_bytes >> 20).to_string();
            let shared = (device.shared_bytes >> 10).to_string();
            let multiprocessors = device.multiprocessors.to_string();
            vec![device.device.clone(), plain(&device.name), device.capability.clone(), multiprocessors, memory, shared]
        });
        context.line(table(&["device", "name", "capability", "multiprocessors", "memory MiB", "shared KiB"], rows, 2));
    }
    if let Some(compiler) = &cuda.compiler {
        context.line(format!("kernels are compiled by {compiler}"));
    }
    for missing in &cuda.missing {
        context.line(format!("CUDA devices: {}", plain(missing)));
    }
}

fn row(adapter: &Adapter) -> Vec<String> {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let sizes = match adapter.subgroup_sizes {
        Some([least, most]) if least == most => least.to_string(),
        Some([least, most]) => format!("{least}-{most}"),
        None => "no".to_owned(),
    };
    vec![
        adapter.device.clone(),
        plain(&adapter.name),
        adapter.kind.to_owned(),
        adapter.backend.to_owned(),
        plain(&adapter.driver),
        yes(adapter.float16),
        sizes,
        yes(adapter.pipeline_cache),
        (adapter.binding_bytes >> 20).to_string(),
        (adapter.workgroup_bytes >> 10).to_string(),
    ]
}
