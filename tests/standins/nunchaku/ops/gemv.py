"""The limit of the kernel behind every modulation, `gemv_awq`."""

MAX_SAMPLES = 8


def assert_gemv_samples(m: int) -> None:
    """`m` samples, one to eight. The real kernel aborts the process."""
    if not 0 < m <= MAX_SAMPLES:
        raise AssertionError(f"Assertion failed: m > 0 && m <= 8, gemv_awq got m = {m}")
