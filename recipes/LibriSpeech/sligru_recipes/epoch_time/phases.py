"""Where the time of a training step goes: features, CNN, RNN and so on, forward and backward.

`watch` puts hooks on a Brain's modules and on their outputs: each marks the moment at which the
next phase begins, so the phases follow each other without a gap and add up to the step. On a GPU
the marks are CUDA events, which are read after the steps; on a CPU, readings of the clock.

A phase holds what runs until the next one begins. "augmentation" has the copy of the batch to the
device too, "features" their normalisation, "CNN" the time pooling, "losses" the softmax and the
CTC output layer, "optimiser" the norm of the gradients, the wait for it, and what the recipe does
after the update.
"""

import contextlib
import time

import torch

FORWARD = ("features", "CNN", "RNN", "DNN", "decoder", "losses")
PHASES = (
    *("data wait", "augmentation", *FORWARD),
    *(f"{phase} backward" for phase in reversed(FORWARD) if phase != "features"),
    "optimiser",
)


class PhaseClock:
    """Adds up the milliseconds between marks, by phase.

    Arguments
    ---------
    device : str
        Of the model.
    """

    def __init__(self, device):
        self.on_gpu = "cuda" in device
        self.marks = []

    def mark(self, phase):
        """From now on it is this phase; None: nothing that counts."""
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((phase, moment))

    def milliseconds(self):
        """Phase -> milliseconds of all steps so far, in the order of `PHASES`."""
        if self.on_gpu:
            torch.cuda.synchronize()
        totals = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if phase is not None:
                totals[phase] += start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)
        return {phase: value for phase, value in totals.items() if value}


@contextlib.contextmanager
def watch(brain, clock):
    """Mark the phases of the Brain's training steps, but for "data wait", as long as this lasts.

    Arguments
    ---------
    brain : ASR
    clock : PhaseClock
    """
    handles = []

    def add(module, phase, after=None):
        """`phase` starts with the module and its backward with the gradient of its output."""

        def when_done(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda gradient: clock.mark(f"{phase} backward"))
            if after is not None:
                clock.mark(after)

        handles.append(module.register_forward_pre_hook(lambda *_: clock.mark(phase)))
        handles.append(module.register_forward_hook(when_done))

    def mark_gradient_of_input(module, inputs):
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: clock.mark("CNN backward"))

    modules, hparams = brain.modules, brain.hparams
    add(hparams.compute_features, "features")
    add(modules.normalize, "features")
    # Hooks on the CNN itself would keep ours from running: it begins with the encoder, and its
    # backward with the gradient of what the next layer is given.
    handles.append(modules.enc.register_forward_pre_hook(lambda *_: clock.mark("CNN")))
    follows_cnn = False
    for name, layer in modules.enc.items():
        if name in ("CNN", "time_pooling"):
            follows_cnn = True
            continue
        if follows_cnn:
            handles.append(layer.register_forward_pre_hook(mark_gradient_of_input))
            follows_cnn = False
        add(layer, name if name in FORWARD else "DNN")
    if "dec" in modules:
        add(modules.emb, "decoder")
        add(modules.dec, "decoder")
        add(modules.seq_lin, "decoder", after="losses")
    add(modules.ctc_lin, "losses")

    compute_forward, compute_objectives = brain.compute_forward, brain.compute_objectives
    finish_batch = brain.finish_batch

    def marked_forward(*args):
        clock.mark("augmentation")
        return compute_forward(*args)

    def marked_objectives(*args):
        loss = compute_objectives(*args)
        loss.register_hook(lambda gradient: clock.mark("losses backward"))
        return loss

    def marked_finish(*args):
        clock.mark("optimiser")
        return finish_batch(*args)

    brain.compute_forward, brain.compute_objectives = marked_forward, marked_objectives
    brain.finish_batch = marked_finish
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in ("compute_forward", "compute_objectives", "finish_batch"):
            delattr(brain, name)
