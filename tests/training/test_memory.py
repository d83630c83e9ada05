"""What our losses and scores hold at once with 168k rows, beside plain logits and cross-entropy."""

import pytest

from unimm.training.memory import MemoryConfig, measure_memory

PLAIN = "plain logits and cross-entropy"
OURS = ("factored loss", "scores under the grammar", "guided scores under the grammar")


@pytest.mark.slow
def test_peaks_with_168k_rows_are_at_most_six_tenths_of_plain_logits():
    peaks = {(peak.targets, peak.way): peak.size for peak in measure_memory(MemoryConfig())}
    shares = {key: size / peaks[key[0], PLAIN] for key, size in peaks.items() if key[1] in OURS}
    assert len(shares) == 4
    assert all(0 < share <= 0.6 for share in shares.values()), shares
