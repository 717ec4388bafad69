"""The endless, resumable order in which prompts are drawn."""

import numpy as np

from megatron_cpgd.errors import DataError


class PromptStream:
    """Endless batches of prompt indices: every prompt once per epoch, none twice in a batch.

    A batch may run over the end of an epoch. The order of epoch e depends on (seed, e) only, but
    for prompts that the batch over the boundary already holds: they come right after it.
    """

    batches: int
    """Drawn so far."""
    _epoch: int
    _position: int
    """Next place in `_order`."""
    _order: list[int]
    """Prompts of this epoch."""

    def __init__(
        self, num_prompts: int, batch_size: int, *, seed: int, shuffle: bool, checksum: int = 0
    ) -> None:
        """
        Args:
            num_prompts: size of the data set; batches hold 0 .. num_prompts - 1.
            batch_size: prompts per batch, at most `num_prompts`.
            seed: of the order.
            shuffle: False draws the data in file order.
            checksum: of the data, which a resumed stream must have again.

        Raises:
            DataError: fewer prompts than a batch needs.
        """
        if batch_size > num_prompts:
            raise DataError(
                f"rollout.prompts_per_step={batch_size} exceeds the {num_prompts} prompts of the "
                "data; a batch must not hold a prompt twice: use more data or a smaller batch"
            )
        self._num_prompts = num_prompts
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._checksum = checksum
        self._rewind()

    def next_batch(self) -> list[int]:
        """The next `batch_size` different prompt indices."""
        batch = self._order[self._position : self._position + self._batch_size]
        self._position += len(batch)
        missing = self._batch_size - len(batch)
        if missing > 0:
            self._epoch += 1
            self._order = self._draw_order(missing, excluded=set(batch))
            self._position = missing
            batch = batch + self._order[:missing]
        self.batches += 1
        return batch

    def state(self) -> dict[str, int]:
        """What `load_state` needs to go on after the last batch drawn."""
        return {"batches": self.batches, **self._identity()}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on where the stream that gave `state` was.

        Raises:
            DataError: the state belongs to other data or another order.
        """
        # A checkpoint of an earlier version has no checksum.
        saved = {key: state.get(key, value) for key, value in self._identity().items()}
        if saved != self._identity():
            raise DataError(
                f"the saved prompt stream has {saved}, this run has {self._identity()}; resume "
                "with the same data, seed and batch size, or start a new run folder"
            )
        self._rewind()
        for _ in range(state["batches"]):  # microseconds per batch
            self.next_batch()

    def _identity(self) -> dict[str, int]:
        return {
            "num_prompts": self._num_prompts,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
            "checksum": self._checksum,
        }

    def _rewind(self) -> None:
        self.batches = 0
        self._epoch = 0
        self._position = 0
        self._order = self._draw_order(0, excluded=set())

    def _draw_order(self, head: int, excluded: set[int]) -> list[int]:
        """The order of this epoch, with none of `excluded` among the first `head`."""
        order = list(range(self._num_prompts))
        if self._shuffle:
            np.random.default_rng([self._seed, self._epoch]).shuffle(order)
        if not excluded:
            return order
        first = [index for index in order if index not in excluded][:head]
        chosen = set(first)
        return first + [index for index in order if index not in chosen]
