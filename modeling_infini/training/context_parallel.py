"""
Context parallelism: one sequence over several ranks, a piece of whole segments on each.

All that a piece needs of the tokens before it is what a cache would hold at its start: M and z, the last segment of
the piece on its left, and the sinks. So that is all that is exchanged, per layer and KV head (d = head_dim, k =
memory_key_dim):

    z      z_start = sum of the z of the ranks before                    k       numbers from each rank
    M      linear  M_start = sum of the M of the ranks before            k * d
           delta   a piece maps M to M + B - C M; M_start = the maps of
                   the ranks before, one after the other, of 0      k * (d + k)
    window N keys and N values from the left neighbour to the right  2 * N * d   (`"sliding"`)
    sinks  keys and values of the first tokens, from rank 0 to all   2 * num_sink_tokens * d

Nothing of it grows with the length. Each exchange is an autograd function whose backward pass is an exchange as well.
All ranks must take part in all of them, in one order. Forwards that is the order of the code. Backwards, autograd runs
what is ready and was made last: it is the reverse order on every rank, as long as the loss of every rank depends on
each exchange. So what a rank does not use of one (rank 0 has nothing before it), it uses with weight 0.
"""

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from ..cache import Past
from ..cache_layer import LayerPast, TokenStates
from ..configuration_infini import InfiniConfig
from ..memory import apply_correction, scan
from ..streams import AlignedLayout, SegmentLayout, streams_of_call
from .backpropagation import checked_targets


class ContextParallel(Past):
    """
    The ranks that share a sequence, and what they say to each other.

        context_parallel = ContextParallel()
        outputs = model(
            **context_parallel.shard(model.config, input_ids=ids, labels=ids), past_key_values=context_parallel
        )
        outputs.loss.backward()
        context_parallel.reduce_gradients(model)

    `outputs` are those of this rank's columns. The ranks' losses add up to the loss of the whole sequence, and after
    `reduce_gradients` every rank holds the gradients of the whole sequence.

    Args:
        process_group: of `torch.distributed`; `None` is all processes. The order of its ranks is that of the pieces.

    Attributes:
        bytes_sent: bytes that this rank has handed to collectives in forward and backward passes, its own tensor once
            for each, however many ranks it goes to: the tensor given to an all_gather and a reduce, the one that rank
            0 broadcasts, the one sent to a neighbour. What gradient checkpointing sends again counts again;
            `reduce_gradients`, whose tensors are the parameters', does not count.
    """

    def __init__(self, process_group: "distributed.ProcessGroup | None" = None):
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "ContextParallel needs a process group: launch the script with torchrun and call "
                "torch.distributed.init_process_group() first."
            )
        self.group = process_group
        self.rank = distributed.get_rank(process_group)
        self.size = distributed.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("This process is not in the process group that ContextParallel was given.")
        self.bytes_sent = 0

    def shard(
        self,
        config: InfiniConfig,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor | int]:
        """
        This rank's part of a batch that every rank has the whole of. Sends nothing.

        Args:
            input_ids, inputs_embeds: `(B, T)`, or `(B, T, hidden_size)`; one of the two.
            labels: `(B, T)`, shifted here, so that the last token of a piece predicts the first of the next.
            shift_labels: `(B, T)`, instead of `labels`: the target of each column.
            attention_mask, position_ids: may only say that there is no padding and one document per row.
            num_items_in_batch: by what a sum of losses is divided; `None` is the number of targets of the batch.

        Returns:
            What to call the model with: this rank's columns of the inputs and of `shift_labels`, and
            `num_items_in_batch`.

        Raises:
            ValueError: padding, packed documents, fewer segments than ranks, or targets that do not fit the inputs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("ContextParallel.shard needs exactly one of input_ids or inputs_embeds.")
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        batch_size, length = next(iter(inputs.values())).shape[:2]
        is_token, restarts = streams_of_call(attention_mask, position_ids, (batch_size, length), None)
        _refuse_ragged(
            has_padding=is_token is not None and not bool(is_token.all()),
            has_restarts=restarts is not None and bool(restarts.any()),
        )

        if labels is not None or shift_labels is not None:
            shift_labels = checked_targets(labels, shift_labels, None, (batch_size, length))
            inputs["shift_labels"] = shift_labels
            if num_items_in_batch is None:
                num_items_in_batch = (shift_labels != -100).sum().clamp(min=1)
        start, end = (self._first_column(rank, length, config.segment_length) for rank in (self.rank, self.rank + 1))
        sharded: dict[str, torch.Tensor | int] = {
            name: states[:, start:end].contiguous() for name, states in inputs.items()
        }
        return sharded if num_items_in_batch is None else {**sharded, "num_items_in_batch": num_items_in_batch}

    def _first_column(self, rank: int, length: int, segment_length: int) -> int:
        """Where the piece of `rank` starts: segments are shared out so that no rank has two more than another."""
        segments = -(-length // segment_length)
        if segments < self.size:
            raise ValueError(
                f"{length} tokens are {segments} segments of segment_length={segment_length}, fewer than the "
                f"{self.size} ranks of the process group: each rank needs a segment of its own."
            )
        return min(segments * rank // self.size * segment_length, length)

    def reduce_gradients(self, model: torch.nn.Module) -> None:
        """
        Sums the gradients of `model` over the ranks, in place. All ranks must call it.

        A parameter without a gradient on some of the ranks counts as 0 there; without one on any, it keeps none.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            return
        has_gradient = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
        distributed.all_reduce(has_gradient, group=self.group)
        for parameter, is_used in zip(parameters, has_gradient.tolist()):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad, group=self.group)

    def check_targets(
        self, labels: torch.Tensor | None, has_targets: bool, num_items_in_batch: torch.Tensor | int | None
    ) -> None:
        if labels is not None:
            raise ValueError(
                "With ContextParallel, the target of a piece's last token is on the next rank. Pass shift_labels "
                "instead of labels: ContextParallel.shard makes them."
            )
        if has_targets and num_items_in_batch is None:
            raise ValueError(
                "With ContextParallel, a loss needs num_items_in_batch, the number of targets on all ranks: "
                "ContextParallel.shard counts it."
            )

    def plan_call(self, attention_mask, position_ids, shape, config, device, packing):
        """
        The layout of this rank's piece. The ranks tell each other what they hold: if it does not fit together, all
        of them raise, and none is left waiting for the others. Arguments as those of [`streams.plan_call`].

        Raises:
            ValueError: padding, packed documents, different numbers of rows, or a piece that is not of whole segments.
        """
        if config.num_memory_slots:
            raise ValueError(
                f"ContextParallel cannot fill num_memory_slots={config.num_memory_slots}: which tokens stay depends "
                "on all ranks before. Load the model with num_memory_slots=0, slot_layers=None, or train without it."
            )
        # At an id of 0, a document would start where rows have tokens before this piece.
        tokens_read = torch.full((shape[0],), int(self.rank > 0), device=device)
        is_token, restarts = streams_of_call(attention_mask, position_ids, shape, tokens_read, packing)
        has_padding = is_token is not None and not bool(is_token.all())
        has_restarts = restarts is not None and bool(restarts.any())
        piece = torch.tensor([*shape, has_padding, has_restarts], device=device)
        batch_sizes, lengths, are_padded, restart = self.gather(piece).T.tolist()
        _refuse_ragged(any(are_padded), any(restart))
        if len(set(batch_sizes)) > 1:
            raise ValueError(f"All ranks must hold pieces of the same rows, but they hold {batch_sizes} rows.")
        if any(length % config.segment_length for length in lengths[:-1]):
            raise ValueError(
                f"Every rank but the last must hold whole segments of segment_length={config.segment_length} tokens, "
                f"but the ranks hold {lengths} tokens. Split batches with ContextParallel.shard."
            )
        # Where rank 0 has one segment only, it reads (with weight 0) as the others do: else it would miss their
        # collectives.
        return AlignedLayout(shape, sum(lengths[: self.rank]), config, device, reads_past=True)

    def window_columns(self, layout, shape):
        raise ValueError(
            "ContextParallel cannot return attention weights, whose columns are those of all ranks: leave "
            "output_attentions out."
        )

    def begin_call(self, layout, may_run_again):
        config = layout.config
        return [PieceOfLayer(layer in config.layers_with_memory, self) for layer in range(config.num_hidden_layers)]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """What each rank holds, `(...)`, to all ranks: `(size, ...)`. Not differentiable."""
        gathered = states.new_empty(self.size, *states.shape)
        distributed.all_gather(list(gathered.unbind(0)), self._sent(states), group=self.group)
        return gathered

    def shift(self, states: torch.Tensor, step: int, received: torch.Tensor) -> None:
        """Sends `states` to rank + `step`, and fills `received` from rank - `step`, as far as there are such ranks."""
        operations = []
        if 0 <= self.rank + step < self.size:
            send = self._sent(states), None, self.group, 0, self.rank + step
            operations.append(distributed.P2POp(distributed.isend, *send))
        if 0 <= self.rank - step < self.size:
            operations.append(distributed.P2POp(distributed.irecv, received, None, self.group, 0, self.rank - step))
        if operations:
            for request in distributed.batch_isend_irecv(operations):
                request.wait()

    def broadcast(self, states: torch.Tensor) -> torch.Tensor:
        """What rank 0 holds. Not differentiable."""
        states = self._sent(states) if self.rank == 0 else torch.empty_like(states)
        distributed.broadcast(states, group=self.group, group_src=0)
        return states

    def reduce(self, states: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks on rank 0, zeros elsewhere. Not differentiable."""
        total = self._sent(states.clone())
        distributed.reduce(total, group=self.group, group_dst=0)
        return total if self.rank == 0 else torch.zeros_like(total)

    def _sent(self, states: torch.Tensor) -> torch.Tensor:
        self.bytes_sent += states.nbytes
        return states.contiguous()


def _refuse_ragged(has_padding: bool, has_restarts: bool) -> None:
    if has_padding:
        raise ValueError(
            "ContextParallel takes rows without padding (attention_mask has zeros). Pack rows of equal length, or "
            "train without it."
        )
    if has_restarts:
        raise ValueError(
            "ContextParallel takes one document per row (position_ids restart). Split packed documents into rows, or "
            "train without it."
        )


class SumOfEarlier(torch.autograd.Function):
    """The sum over the ranks before this one; backwards, over those after it."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, context_parallel: ContextParallel) -> torch.Tensor:
        ctx.context_parallel = context_parallel
        return context_parallel.gather(states)[: context_parallel.rank].sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        context_parallel = ctx.context_parallel
        return context_parallel.gather(gradient)[context_parallel.rank + 1 :].sum(0), None


class MapsOfEarlier(torch.autograd.Function):
    """
    What the ranks before this one make of an empty memory, each of which maps M to M + B - C M.

    The gradient L of the memory after a rank's piece is the sum of what its successors' reads want of it: it is the
    same scan from the other end, L -> L + G - C^T L with G the gradient of the rank's start.
    """

    @staticmethod
    def forward(
        ctx, writes: torch.Tensor, corrections: torch.Tensor, context_parallel: ContextParallel
    ) -> torch.Tensor:
        """B `(B, ..., key_dim, value_dim)` and C `(B, ..., key_dim, key_dim)` of each rank to its M_start."""
        rank = context_parallel.rank
        maps = context_parallel.gather(torch.cat([writes, corrections], -1)).movedim(0, 1)
        all_writes, all_corrections = maps.tensor_split([writes.shape[-1]], -1)
        start = scan(torch.zeros_like(writes), all_writes[:, :rank], all_corrections[:, :rank])[:, -1]
        ctx.context_parallel = context_parallel
        ctx.save_for_backward(start, all_corrections[:, rank + 1 :].clone())
        return start

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        start, corrections_after = ctx.saved_tensors
        context_parallel = ctx.context_parallel
        gradients_after = context_parallel.gather(gradient)[context_parallel.rank + 1 :].movedim(0, 1)
        transposed = corrections_after.flip(1).transpose(-1, -2)
        of_writes = scan(torch.zeros_like(gradient), gradients_after.flip(1), transposed)[:, -1]
        return of_writes, -apply_correction(of_writes, start.transpose(-1, -2)), None


class FromLeft(torch.autograd.Function):
    """The left neighbour's `states`, of `length` columns; zeros on rank 0. The last rank's may have fewer columns."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, length: int, context_parallel: ContextParallel) -> torch.Tensor:
        ctx.context_parallel, ctx.shape = context_parallel, states.shape
        received = states.new_zeros(states.shape[0], length, *states.shape[2:])
        context_parallel.shift(states, 1, received)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        received = gradient.new_zeros(ctx.shape)
        ctx.context_parallel.shift(gradient, -1, received)
        return received, None, None


class FromFirst(torch.autograd.Function):
    """The `states` of rank 0, on all ranks."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, context_parallel: ContextParallel) -> torch.Tensor:
        ctx.context_parallel = context_parallel
        return context_parallel.broadcast(states)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.context_parallel.reduce(gradient), None


class PieceOfLayer(LayerPast):
    """What a layer goes on from in this rank's piece: the segment before it, the sinks, and the memory so far."""

    def __init__(self, has_memory: bool, context_parallel: ContextParallel):
        super().__init__(has_memory)
        self.context_parallel = context_parallel

    def ring(self, states: TokenStates, layout: SegmentLayout):
        if not layout.config.is_sliding:
            return None, None
        sinks, length = layout.config.num_sink_tokens, layout.config.segment_length
        both = torch.cat(states[:2], -1)
        slots = FromLeft.apply(both[:, -length:], length, self.context_parallel)
        if sinks:
            # The last piece may have fewer tokens, and receives as many.
            first = both[:, torch.arange(sinks, device=both.device).clamp(max=both.shape[1] - 1)]
            slots = torch.cat([FromFirst.apply(first, self.context_parallel), slots], 1)
        return slots.chunk(2, -1)

    def first_normaliser(self, added, layout):
        return SumOfEarlier.apply(added.sum(1), self.context_parallel)

    def first_matrix(self, added, corrections, layout):
        if corrections is None:
            return SumOfEarlier.apply(added.sum(1), self.context_parallel)
        # A piece maps M to writes + M - corrections M. I - corrections is the product of those of its segments, so
        # that corrections are a state with those of segments for writes.
        both = torch.cat([added, corrections], -1)
        total = scan(torch.zeros_like(both[:, 0]), both, corrections)[:, -1]
        return MapsOfEarlier.apply(*total.tensor_split([added.shape[-1]], -1), self.context_parallel)


__all__ = ["ContextParallel"]
