"""Go on with a part of a batch: what the cache of the decoder holds of the other rows is left behind."""

from __future__ import annotations

from unimm.unified.decoder import CachedDecoder


class NarrowingDecoder(CachedDecoder):
    """A decoder whose last rows may be dropped on the way, as those of guidance are once nothing is guided any more."""

    def keep(self, rows: int) -> None:
        """Go on with the first rows only; their keys and values stay where they are."""
        self.keys = [keys[:rows] for keys in self.keys]
        self.values = [values[:rows] for values in self.values]
        self.starts = self.starts[:rows]
        if self.padding is not None:
            kept = self.padding[:rows]
            self.padding = kept if bool(kept.any()) else None
