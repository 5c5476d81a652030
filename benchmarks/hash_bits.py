"""Hashes what the operator computes, to show that a change of the code changes no bit.

    python benchmarks/hash_bits.py before.json                          # at one commit
    python benchmarks/hash_bits.py after.json --compare before.json     # at another, same machine

A case is a layer with fresh random inputs, drawn on the CPU from the case's own seed; its hash is
that of the hidden states and of every gradient. The cases cover every kernel: both cells, all
dtypes, activations and backends of the device, sizes that fill a cluster and that do not, one and
two directions, with and without initial state, dropout mask and affine norm, and autocast. With
--compare the exit status is 1 if a case is missing or differs.
"""

import argparse
import hashlib
import itertools
import json
import platform
import sys

import torch

import sb_fast_sligru
from sb_fast_sligru import ops, reference

TIME = 7
# Hidden units; batch entries of a layer of one and of two directions: with few rows and, where
# there are kernels for those, with many.
SIZES = [
    (16, [(3, False), (2, True)]),
    (72, [(5, False), (9, True)]),
    (128, [(16, False)]),
    (200, [(5, False)]),
    (256, [(3, True)]),
    (264, [(17, True)]),
    (512, [(5, False), (16, False), (23, True)]),
    (1016, [(9, False), (43, True)]),
    (1024, [(1, False), (24, True), (120, True)]),
]
DTYPES = {
    "cpu": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "cuda": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
}
BACKENDS = {"cpu": ["cpu"], "cuda": ["persistent", "stepwise"]}


def cases(device):
    """Yield the arguments of `digest`, each with its name."""
    for (hidden, batches), dtype, layer_norm in itertools.product(
        SIZES, DTYPES[device], (True, False)
    ):
        for batch, bidirectional in batches:
            for backend, autocast in itertools.product(BACKENDS[device], (False, True)):
                if backend == "persistent" and dtype == torch.float64:
                    continue
                if autocast and (device == "cpu" or dtype not in (torch.bfloat16, torch.float16)):
                    continue
                for activation in reference.ACTIVATIONS:
                    if activation != "relu" and (batch > 5 or bidirectional) and hidden != 1024:
                        continue
                    case = (hidden, batch, bidirectional, dtype, layer_norm, activation)
                    name = (
                        f"{backend} {str(dtype)[6:]}{' autocast' if autocast else ''} "
                        f"{'SLi-GRU' if layer_norm else 'Li-GRU'} {activation} H={hidden} "
                        f"B={batch}{' bidirectional' if bidirectional else ''}"
                    )
                    yield name, backend, autocast, case


def inputs_of(name, hidden, batch, bidirectional, dtype, layer_norm):
    """Draw the operator's tensors; every second case has all the optional ones."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = batch * (2 if bidirectional else 1)
    tensors = {"wx": random(batch, TIME, 2 * hidden), "u": random(2 * hidden, hidden) / hidden**0.5}
    if seed % 2:
        tensors["h0"] = random(rows, hidden)
        tensors["drop_mask"] = (random(rows, hidden) > -1).to(dtype) / 0.85
        if layer_norm:
            tensors |= {"ln_weight": 1 + random(2 * hidden) / 4, "ln_bias": random(2 * hidden) / 4}
    return tensors, random(batch, TIME, hidden * (2 if bidirectional else 1))


def digest(device, name, backend, autocast, case):
    """Hash of the states and gradients of one case."""
    hidden, batch, bidirectional, dtype, layer_norm, activation = case
    parameters = torch.float32 if autocast else dtype
    tensors, grad = inputs_of(name, hidden, batch, bidirectional, parameters, layer_norm)
    tensors = {key: t.to(device) for key, t in tensors.items()}
    wanted = [t.requires_grad_() for key, t in tensors.items() if key != "drop_mask"]
    options = {"layer_norm": layer_norm, "activation": activation, "bidirectional": bidirectional}
    with sb_fast_sligru.backend(backend), torch.autocast(device, dtype, enabled=autocast):
        h = ops.light_gru(**tensors, **options)
    gradients = torch.autograd.grad(h, wanted, grad.to(device, h.dtype))
    hashed = hashlib.sha256()
    for t in (h, *gradients):
        hashed.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--compare", metavar="JSON", help="an earlier output")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = arguments.device
    hashes = {case[0]: digest(device, *case) for case in cases(device)}
    machine = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": platform.processor() or platform.machine(),
    }
    report = {"machine": machine, "torch": torch.__version__, "hashes": hashes}
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    print(f"{len(hashes)} cases on {machine['gpu'] or machine['cpu']}")
    if arguments.compare is None:
        return
    with open(arguments.compare, encoding="utf-8") as file:
        before = json.load(file)["hashes"]
    changed = [case for case in before | hashes if before.get(case) != hashes.get(case)]
    print(f"{len(before | hashes) - len(changed)} equal, {len(changed)} not", *changed, sep="\n  ")
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
