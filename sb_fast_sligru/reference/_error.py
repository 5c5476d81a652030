"""How far a result is from a reference's."""


def relative_error(actual, expected):
    """||actual - expected|| / ||expected||, computed in float64 on the CPU.

    Arguments
    ---------
    actual, expected : torch.Tensor
        Of one shape.

    Returns
    -------
    error : float
        NaN if `actual` has one, so that no comparison with a bound passes.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual: got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
