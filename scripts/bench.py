"""Measures what docs/benchmarks.md states: roofs, single layers, whole training steps, against dense torch and the
published packages. Opponents take turns in one process; figures are medians, ratios of medians, and GF/s.

    python scripts/bench.py [--threads 2] [--sections layers steps ...] [--json F] [--markdown F]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import sparse_ft
from sparse_ft import ops
from sparse_ft.bench import compare_steps
from sparse_ft.memory import keep_freed_memory
from sparse_ft.ops import _native
from sparse_ft.tune import interleaved_medians

LINEAR = (768, 3072, 2048)  # in, out, tokens
RESNET18 = [  # in, out, size, kernel, stride; how often in the network
    (64, 64, 56, 3, 1, 4),
    (64, 128, 56, 3, 2, 1),
    (64, 128, 56, 1, 2, 1),
    (128, 128, 28, 3, 1, 3),
    (128, 256, 28, 3, 2, 1),
    (128, 256, 28, 1, 2, 1),
    (256, 256, 14, 3, 1, 3),
    (256, 512, 14, 3, 2, 1),
    (256, 512, 14, 1, 2, 1),
    (512, 512, 7, 3, 1, 3),
]


def random_sparse(shape: tuple[int, ...], sparsity: float) -> torch.Tensor:
    weight = torch.randn(shape)
    weight[torch.rand(shape) < sparsity] = 0
    return weight


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine() -> dict[str, str]:
    packages = ("torch", "timm", "transformers", "sparseprop", "sparselab")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "AMX": "yes" if "amx_tile" in flags else "no",
        "instruction set": ops.active_isa(),
        "threads": str(torch.get_num_threads()),
        "sparse_ft": sparse_ft.__version__,
        **versions,
    }


def roofs() -> dict[str, float]:
    """GF/s of one core."""
    return {
        "FMA from registers": _native.fma_peak(0.3),
        "load + FMA, 16 KiB": _native.load_fma_peak(16 << 10, 0.3),
        "load + FMA, 256 KiB": _native.load_fma_peak(256 << 10, 0.3),
        "load + FMA, 8 MiB": _native.load_fma_peak(8 << 20, 0.3),
    }


def backward_only(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = forward()
        out.backward(torch.ones_like(out))
        for parameter in parameters:
            parameter.grad = None

    return run


def linear_rivals(sparsity: float) -> dict[str, Callable[[], None]]:
    """Forward + backward (input and weight gradient) of one linear layer, each package's own layer."""
    inputs, outputs, tokens = LINEAR
    dense = torch.nn.Linear(inputs, outputs)
    with torch.no_grad():
        dense.weight.copy_(random_sparse((outputs, inputs), sparsity))

    def entry(layer) -> Callable[[], None]:
        x = torch.randn(tokens, inputs, requires_grad=True)
        return backward_only(lambda: layer(x), [x, *layer.parameters()])

    rivals = {"sparse_ft": entry(sparse_ft.nn.SparseLinear.from_dense(dense)), "torch dense": entry(dense)}
    try:
        from sparseprop.modules import SparseLinear as SparsepropLinear

        rivals["sparseprop"] = entry(SparsepropLinear.from_dense(dense))
    except ImportError as error:
        print(f"sparseprop is left out: {error}", file=sys.stderr)
    try:
        import sparselab

        rivals["sparselab"] = entry(sparselab.SparseLinear(inputs, outputs, sparsity=sparsity))
    except ImportError as error:
        print(f"sparselab is left out: {error}", file=sys.stderr)
    return rivals


def csr_forward(sparsity: float) -> dict[str, Callable[[], object]]:
    """Forward only: torch's CSR has no usable gradient for a fixed pattern on CPU."""
    inputs, outputs, tokens = LINEAR
    weight = random_sparse((outputs, inputs), sparsity)
    pattern, values = ops.SparsePattern.build(weight)
    csr, x = weight.to_sparse_csr(), torch.randn(tokens, inputs)
    xt = x.t().contiguous()
    native = torch.ops.sparse_ft.linear
    return {
        "sparse_ft": lambda: native(x, values, None, pattern.tensors, inputs, outputs),
        "torch CSR": lambda: csr @ xt,
        "torch dense": lambda: F.linear(x, weight),
    }


def measure_layers(sparsities: list[float]) -> dict:
    results: dict = {"linear": {}, "csr": {}, "products": []}
    for sparsity in sparsities:
        results["linear"][sparsity] = interleaved_medians(linear_rivals(sparsity), rounds=9)
        results["csr"][sparsity] = interleaved_medians(csr_forward(sparsity), rounds=9)
        results["products"].append({"layer": f"linear {LINEAR[0]}→{LINEAR[1]}", "sparsity": sparsity,
                                    **linear_products(sparsity)})  # fmt: skip
        for spec in RESNET18:
            results["products"].append(
                {"layer": conv_name(spec), "sparsity": sparsity, **conv_products(spec, sparsity)}
            )
    return results


def conv_name(spec: tuple[int, ...]) -> str:
    inputs, outputs, size, kernel, stride, _ = spec
    return f"conv {inputs}→{outputs} {kernel}×{kernel}" + (f" /{stride}" if stride > 1 else "") + f", {size}²"


def linear_products(sparsity: float) -> dict[str, float]:
    inputs, outputs, tokens = LINEAR
    pattern, values = ops.SparsePattern.build(random_sparse((outputs, inputs), sparsity))
    x, grad, indices = torch.randn(tokens, inputs), torch.randn(tokens, outputs), pattern.tensors
    op = torch.ops.sparse_ft
    medians = interleaved_medians(
        {
            "forward": lambda: op.linear(x, values, None, indices, inputs, outputs),
            "input_grad": lambda: op.linear_input_grad(grad, values, indices, inputs, outputs),
            "weight_grad": lambda: op.linear_weight_grad(grad, x, indices, inputs, outputs),
        },
        rounds=9,
    )
    return {name: 2e-9 * pattern.nnz * tokens / seconds for name, seconds in medians.items()}


def conv_products(spec: tuple[int, ...], sparsity: float, batch: int = 32) -> dict[str, float]:
    inputs, outputs, size, kernel, stride, _ = spec
    pad = kernel // 2
    weight = random_sparse((outputs, inputs, kernel, kernel), sparsity)
    pattern, values = ops.SparsePattern.build(weight, stride=(stride, stride), padding=(pad, pad))
    geometry = (list(weight.shape), [stride] * 2, [pad] * 4, [1, 1], 1)
    op, indices = torch.ops.sparse_ft, pattern.tensors
    x = op.to_layout(torch.randn(batch, inputs, size, size), ops.BATCH_LAST)
    y = op.conv2d(x, values, None, indices, *geometry)
    grad = torch.randn_like(y)
    medians = interleaved_medians(
        {
            "forward": lambda: op.conv2d(x, values, None, indices, *geometry),
            "input_grad": lambda: op.conv2d_input_grad(grad, values, indices, *geometry, list(x.shape)),
            "weight_grad": lambda: op.conv2d_weight_grad(grad, x, indices, *geometry),
        },
        rounds=9,
    )
    flops = 2e-9 * pattern.nnz * batch * y.shape[2] * y.shape[3]
    return {name: flops / seconds for name, seconds in medians.items()}


def measure_steps(rounds: int) -> list[dict]:
    rows = []
    for name, sparsity, batch, size in (
        ("resnet18", 0.95, 32, 224),
        ("resnet18", 0.90, 32, 224),
        ("resnet18", 0.95, 64, 32),
        ("resnet50", 0.95, 16, 224),
        ("mobilenetv1_100", 0.90, 32, 224),
    ):
        torch.manual_seed(0)
        model = timm.create_model(name)
        sparse_ft.prune(model, sparsity)
        x = torch.randn(batch, 3, size, size)
        report = sparse_ft.convert(model, x)
        comparison = compare_steps(model, x, steps=rounds)
        rows.append(
            {"model": name, "sparsity": sparsity, "batch": batch, "size": size,
             "native": len(report.converted), "layers": len(report.layers), **comparison.to_dict()}
        )  # fmt: skip
        print(f"{name} {sparsity:.0%} b{batch} {size}²: {comparison}", flush=True)
    return rows


def measure_pattern() -> dict[str, float]:
    weight = random_sparse((2500, 4000), 0.9)
    return interleaved_medians(
        {"build": lambda: ops.SparsePattern.build(weight), "read": lambda: weight.abs().sum()}, rounds=9
    )


def rivals_table(measured: dict, what: str) -> str:
    rows = [
        [f"{float(sparsity):.0%}", name, f"{seconds * 1e3:.1f}", f"{seconds / medians['sparse_ft']:.2f}"]
        for sparsity, medians in measured.items()
        for name, seconds in medians.items()
    ]
    inputs, outputs, tokens = LINEAR
    return markdown_table([f"linear {inputs}→{outputs}, {tokens} tokens", "package", what, "× sparse_ft"], rows)


def render(results: dict) -> str:
    parts = [markdown_table(["machine", ""], [[k, v] for k, v in results["machine"].items()])]
    peak = results["roofs"]["FMA from registers"]
    parts.append(
        markdown_table(
            ["roof of one core", "GF/s", "share of peak"],
            [[k, f"{v:.0f}", f"{v / peak:.2f}"] for k, v in results["roofs"].items()],
        )
    )
    if "steps" in results:
        parts.append(
            markdown_table(
                ["training step", "native layers", "dense ms (contiguous / channels_last)", "sparse ms", "× dense"],
                [
                    [
                        f"{r['model']} {r['sparsity']:.0%}, batch {r['batch']}, {r['size']}²",
                        f"{r['native']} of {r['layers']}",
                        f"{r['variants']['dense contiguous']:.0f} / {r['variants']['dense channels_last']:.0f}",
                        f"{r['sparse_ms']:.0f}",
                        f"{r['speedup']:.2f}",
                    ]
                    for r in results["steps"]
                ],
            )
        )
    if "layers" in results:
        layers = results["layers"]
        parts.append(rivals_table(layers["linear"], "forward + backward, ms"))
        parts.append(rivals_table(layers["csr"], "forward only, ms"))
        threads = int(results["machine"]["threads"])
        names = ("forward", "input_grad", "weight_grad")
        parts.append(
            markdown_table(
                ["layer (batch 32)", "sparsity", *(f"{n} GF/s (share of peak)" for n in names)],
                [
                    [p["layer"], f"{p['sparsity']:.0%}"] + [f"{p[n]:.0f} ({p[n] / peak / threads:.2f})" for n in names]
                    for p in layers["products"]
                ],
            )
        )
    if "pattern" in results:
        build, read = results["pattern"]["build"], results["pattern"]["read"]
        parts.append(
            f"Pattern of a 10 M parameter weight at 90 %: {build * 1e3:.0f} ms, {build / read:.1f} times one torch "
            f"pass over it ({read * 1e3:.1f} ms)."
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sections", nargs="+", default=["layers", "steps", "pattern"],
                        choices=["layers", "steps", "pattern"])  # fmt: skip
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(keep_freed_memory())
    results: dict = {"machine": machine(), "roofs": roofs()}
    if "steps" in args.sections:
        results["steps"] = measure_steps(args.rounds)
    if "layers" in args.sections:
        results["layers"] = measure_layers(args.sparsity)
    if "pattern" in args.sections:
        results["pattern"] = measure_pattern()
    text = render(results)
    print("\n" + text)
    for path, content in ((args.json, json.dumps(results, indent=1)), (args.markdown, text + "\n")):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)


if __name__ == "__main__":
    main()
