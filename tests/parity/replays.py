"""The peaks that the memory estimate's replay finds, as `memory_oracle` measures them in a real step."""

from peftlab.memory.replay.tape import backward


def replayed_peaks(run):
    """Bytes above the parameters, at the most, of forward and of backward, in the second of two replayed steps."""
    memory, peaks = run.memory, []
    start = memory.total
    run.step()
    memory.peak = memory.total
    with run.net.under_autocast():
        run.loss = run.forward()
    peaks.append(memory.peak - start)
    memory.peak = memory.total
    backward(run.loss.node, [run.loss.new()])
    return [*peaks, memory.peak - start]
