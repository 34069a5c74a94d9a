"""Markdown from results: the tables of docs/benchmarks.md."""

import re
from pathlib import Path

from .kernels import geometric_mean

PRODUCTS = ("forward", "input gradient", "weight gradient")


def table(headers: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def sections(results: dict) -> dict[str, str]:
    """Markdown by section, of the cases that were measured."""
    cases: dict[str, dict] = {name: case["figures"] for name, case in results["cases"].items()}

    def those(prefix: str) -> list[dict]:
        return [case for name, case in cases.items() if name.startswith(prefix)]

    texts = {"machine": table(["machine", ""], [[key, value] for key, value in results["machine"].items()])}
    if "roofs" in cases:
        texts["roofs"] = _roofs(cases["roofs"])
    if rows := those("train/"):
        texts["training"] = _training(rows)
    if rows := those("infer/"):
        texts["inference"] = _inference(rows)
    if rows := those("memory/"):
        texts["memory"] = "\n\n".join(map(_memory, rows))
    if rows := those("plain/"):
        texts["plain"] = _plain(rows)
    if rows := those("swat/"):
        texts["swat"] = _swat(rows)
    if rows := those("channels/"):
        texts["channels"] = "\n\n".join(map(_channels, rows))
    if rows := those("linear-"):
        texts["linear"] = _packages(rows) + "\n\n" + _products(rows)
    if rows := those("conv-"):
        texts["convolutions"] = _means(rows) + "\n\n" + _products(rows)
    if "depthwise" in cases:
        texts["depthwise"] = _depthwise(cases["depthwise"])
    if "pattern" in cases:
        build, read = cases["pattern"]["build"], cases["pattern"]["read"]
        texts["pattern"] = (
            f"Pattern of a weight of 10 M parameters at 90 %: {build:.0f} ms, {build / read:.1f} times one torch pass "
            f"over it ({read:.1f} ms)."
        )
    return texts


def fill(page: Path, texts: dict[str, str]) -> str:
    """The page with each section between its marks (`<!-- begin NAME -->`, `<!-- end NAME -->`) replaced.

    Raises:
        ValueError: the page has no marks for a section, or marks for one that is not there.
    """
    text = page.read_text(encoding="utf-8")
    marked = set(re.findall(r"<!-- begin ([\w ]+) -->", text))
    if marked != set(texts):
        raise ValueError(f"{page} has marks for {sorted(marked)}, the results are {sorted(texts)}")
    for name, content in texts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"{page} has no {end!r}")
        text = f"{head}{begin}\n\n{content}\n\n{end}{tail}"
    return text


def _roofs(roofs: dict[str, float]) -> str:
    peak = roofs["FMA from registers"]
    rows = [[name, f"{rate:.0f}", f"{rate / peak:.2f}"] for name, rate in roofs.items()]
    return table(["roof of one core", "GF/s", "share of peak"], rows)


def _depthwise(case: dict) -> str:
    return table(
        [
            f"norm, ReLU, 3×3, norm; batch {case['batch']}",
            "forward, ms (apart / together)", "×", "backward, ms (apart / together)", "×",
        ],
        [
            [
                row["layer"],
                *(
                    text
                    for way in ("forward", "backward")
                    for text in (
                        f"{row[f'{way}_apart']:.1f} / {row[f'{way}_together']:.1f}",
                        f"{row[f'{way}_apart'] / row[f'{way}_together']:.2f}",
                    )
                ),
            ]
            for row in case["rows"]
        ],
    )  # fmt: skip


def _swat(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        sparsity, kept, weights = row["workload"]["sparsity"], row["kept_mib"], row["weights_mib"]
        done = row["operations"]
        share = sum(done.values()) / 3
        swat_weights = weights["values"] + weights["positions"]
        lines.append([
            row["title"], f"{row['dense_ms']:.0f}", f"{row['swat_ms']:.0f}", f"{row['dense_ms'] / row['swat_ms']:.2f}",
            f"{row['choosing_ms'] / row['period'] / row['swat_ms']:.1%}",
            f"{row['sparse_products']} of {row['products']}",
            f"{share:.1%} ({1 - sparsity:.1%})", f"{kept['dense']:.0f} / {kept['swat']:.0f}",
            f"{weights['dense']:.1f} / {swat_weights:.1f}",
        ])  # fmt: skip
    headers = [
        "training step under SWAT", "dense fp32, ms", "SWAT, ms", "× dense fp32", "choosing weights, share of a step",
        "sparse products", "multiply-adds, of dense ones (paper's model)", "kept for backward, dense / SWAT, MiB",
        "weights read in backward, dense / SWAT, MiB",
    ]  # fmt: skip
    return table(headers, lines)


def _training(rows: list[dict]) -> str:
    lines, lost = [], []
    for row in rows:
        native, step = f"{row['native']} of {row['layers']}", row.get("step")
        if step is None:
            choice = row["choice"] or {}
            dense = f"{choice['dense_ms']:.0f}" if choice else ""
            lines.append([row["title"], native, dense, "", "left dense", "1.00", "", ""])
            continue
        ms = step["variants"]
        fp32 = [time for name, time in ms.items() if name.startswith("dense") and "bf16" not in name]
        ours = " / ".join(f"{time:.0f}" for name, time in ms.items() if name.startswith("sparse"))
        faults = step["page_faults"]
        dense_faults = min(count for name, count in faults.items() if name.startswith("dense"))
        against_bf16 = step["dense_bf16_ms"] / min(time for name, time in ms.items() if name.startswith("sparse"))
        lines.append([
            row["title"], native, " / ".join(f"{time:.0f}" for time in fp32), f"{step['dense_bf16_ms']:.0f}", ours,
            f"{step['speedup']:.2f}", f"{against_bf16:.2f}", f"{dense_faults:,} / {faults['sparse']:,}",
        ])  # fmt: skip
        for ratio, opponent in ((step["speedup"], "dense fp32"), (against_bf16, "dense bf16")):
            if ratio < 1.0:
                lost.append(f"{row['title']} against {opponent} ({ratio:.2f})")
    headers = [
        "training step", "sparse layers", "dense fp32, ms (contiguous / channels_last)", "dense bf16, ms",
        "sparse, ms (fp32 / bf16)", "× dense fp32", "× dense bf16", "page faults, dense / sparse",
    ]  # fmt: skip
    where = (
        f"Where the sparse step is the slower one: {'; '.join(lost)}."
        if lost
        else "The sparse step wins in every row."
    )
    return f"{table(headers, lines)}\n\n{where}"


def _inference(rows: list[dict]) -> str:
    lines, lost = [], []
    for row in rows:
        ms = row["ms"]
        fp32 = {name: ms[name] for name in ("dense contiguous", "dense channels_last")}
        opponents = {"dense fp32": min(fp32.values()), "dense bf16": ms["dense bf16 channels_last"],
                     "onnxruntime": ms["onnxruntime"]}  # fmt: skip
        ours = min(time for name, time in ms.items() if name.startswith("sparse"))
        lines.append([
            row["title"], f"{row['native']} of {row['layers']}", " / ".join(f"{time:.1f}" for time in fp32.values()),
            f"{opponents['dense bf16']:.1f}", f"{opponents['onnxruntime']:.1f}",
            " / ".join(f"{time:.1f}" for name, time in ms.items() if name.startswith("sparse")),
            *(f"{time / ours:.2f}" for time in opponents.values()),
        ])  # fmt: skip
        lost += [f"{row['title']} against {name} ({t / ours:.2f})" for name, t in opponents.items() if t < ours]
    headers = [
        "forward, no gradients", "sparse layers", "dense fp32, ms (contiguous / channels_last)", "dense bf16, ms",
        "onnxruntime fp32, ms", "sparse, ms", "× dense fp32", "× dense bf16", "× onnxruntime",
    ]  # fmt: skip
    where = (
        f"Where the sparse pass is the slower one: {'; '.join(lost)}."
        if lost
        else "The sparse pass wins in every row."
    )
    return f"{table(headers, lines)}\n\n{where}"


def _memory(case: dict) -> str:
    dense = {name: v for name, v in case["variants"].items() if name.startswith("dense") and "bf16" not in name}
    state = min(v["state"] for v in dense.values())
    peak = min(v["peak"] for v in dense.values())
    rows = [
        [
            name, *(f"{v[key] / 2**20:.1f}" for key in ("weights", "gradients", "optimizer", "state")),
            f"{v['state'] / state:.3f}", f"{v['indices'] / 2**20:.1f}", f"{v['peak'] / 2**20:.0f}",
            f"{v['peak'] / peak:.2f}",
        ]
        for name, v in case["variants"].items()
    ]  # fmt: skip
    headers = [
        f"{case['title']}, {case['optimizer']}; MB", "weights", "gradients", "optimizer", "together", "of dense fp32",
        "sparse indices", "peak of the process", "of dense fp32",
    ]  # fmt: skip
    return table(headers, rows)


def _plain(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        ms = row["ms"]
        dense = [time for name, time in ms.items() if name.startswith("dense")]
        lines.append([
            f"{row['what']}, {row['title']}", " / ".join(f"{time:.0f}" for time in dense),
            f"{ms['sparse, nothing kept']:.0f}", f"{ms['sparse']:.0f}",
            f"{ms['sparse, nothing kept'] / ms['sparse']:.2f}", f"{min(dense) / ms['sparse']:.2f}",
        ])  # fmt: skip
    headers = [
        "malloc as it is", "dense fp32, ms (contiguous / channels_last)", "sparse, nothing kept, ms", "sparse, ms",
        "× nothing kept", "× dense fp32",
    ]  # fmt: skip
    return table(headers, lines)


def _channels(case: dict) -> str:
    """Against the faster dense layout, beside what the count of operations promises."""
    dense = min(ms for name, ms in case["ms"].items() if name.startswith("dense"))
    rows = [["dense", "", f"{dense:.0f}", "1.00", "", ""]]
    for name, ms in case["ms"].items():
        if name.startswith("dense"):
            continue
        backward, keep = name.split()
        promised = (0.75 if backward == "one" else 0.5) / case["operations"][keep]
        rows.append([
            f"{float(keep):.0%} of the channels, {backward}", f"{case['operations'][keep]:.3f}", f"{ms:.0f}",
            f"{dense / ms:.2f}", f"{promised:.2f}", f"{dense / ms / promised:.2f}",
        ])  # fmt: skip
    headers = [case["title"], "operations of a sub-network (f)", "step, ms", "× dense", "0.75/f or 0.5/f", "reached"]
    return table(headers, rows)


def _packages(cases: list[dict]) -> str:
    lines = []
    for case in cases:
        for row in case["rows"]:
            times = row["rivals"]
            ours = times["sparse_ft"]
            for name, ms in times.items():
                lines.append([
                    f"{case['sparsity']:.0%}", str(row["threads"]), name, f"{ms['forward']:.1f}",
                    f"{ms['forward'] / ours['forward']:.2f}", f"{ms['step']:.1f}" if "step" in ms else "",
                    f"{ms['step'] / ours['step']:.2f}" if "step" in ms else "",
                ])  # fmt: skip
    layer = cases[0]["rows"][0]["layer"]
    headers = [layer, "cores", "package", "forward, ms", "× sparse_ft", "forward + backward, ms", "× sparse_ft"]
    return table(headers, lines)


def _products(cases: list[dict]) -> str:
    lines = [
        [
            row["layer"], f"{case['sparsity']:.0%}", str(row["threads"]),
            *(f"{row['gflops'][p]:.0f} ({row['gflops'][p] / row['peak'] / row['threads']:.2f})" for p in PRODUCTS),
        ]
        for case in cases
        for row in case["rows"]
    ]  # fmt: skip
    return table(["layer", "sparsity", "cores", *(f"{p}, GF/s (share of peak)" for p in PRODUCTS)], lines)


def _means(cases: list[dict]) -> str:
    """Geometric means over the 3×3 convolutions."""
    lines = []
    for case in cases:
        chosen = [row for row in case["rows"] if row["kernel"] == 3]
        one = [row for row in chosen if row["threads"] == 1]
        for threads in sorted({row["threads"] for row in chosen}):
            rows = [row for row in chosen if row["threads"] == threads]
            shares = [geometric_mean([r["gflops"][p] / r["peak"] / threads for r in rows]) for p in PRODUCTS]
            gain = [
                geometric_mean([r["gflops"][p] / o["gflops"][p] for r, o in zip(rows, one, strict=True)])
                for p in PRODUCTS
            ]
            lines.append([
                f"{case['sparsity']:.0%}", str(threads), *(f"{share:.2f}" for share in shares),
                " / ".join(f"{g:.2f}" for g in gain), f"{_times(rows, 'torch dense'):.2f}",
                f"{_times(rows, 'sparseprop'):.2f}" if any("sparseprop" in n for n in rows[0]["rivals"]) else "",
            ])  # fmt: skip
    headers = [
        "3×3 convolutions of ResNet-18, geometric mean", "cores", *(f"{p}, share of peak" for p in PRODUCTS),
        "× one core (each product)", "torch dense, × sparse_ft", "sparseprop, × sparse_ft",
    ]  # fmt: skip
    return table(headers, lines)


def _times(rows: list[dict], package: str) -> float:
    """Forward and backward of a package (its faster form) over ours, geometric mean."""
    ratios = []
    for row in rows:
        steps = {name: ms["step"] for name, ms in row["rivals"].items() if name.startswith(package)}
        ratios.append(min(steps.values()) / row["rivals"]["sparse_ft"]["step"])
    return geometric_mean(ratios)
