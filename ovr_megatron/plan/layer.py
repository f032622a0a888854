"""Bytes that one transformer layer stores for its backward pass on a rank, and those that it works on.

Elements of one layer, by row of the table: T rows of the pack on this rank, S of them where sequence parallelism cuts
them; D width, Q query and K key columns, F MLP columns of this rank, N query heads:

    none       S 4D + 2 norm scales + attention + T 3F      (the MLP's gate and up 2F, their product F)
    selective  S 3D + 1 norm scale + attention              (the MLP is recomputed)
    full       S D                                          (the layer is recomputed)
    attention  T (3Q + 3K) + N  with Transformer Engine: query, key, output and the fused product, which the value is a
               view of;  T 4Q + N  with ours on a GPU, keys and values repeated, and T Q more where documents are
               batched;  T (3Q + 3K) + N  with ours on a CPU, where query heads share them and no batch is stored;
               under context parallelism there  T 2Q + 2K' + N  and T Q more, K' the key columns of all ranks' rows

On a CPU a layer stores T F more, the gate's activation.  An MLP without a gate has F in place of 2F.  Norms by head
store their scales and, where the layer does not keep it anyway, the fused product of query, key and value.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Kernels:
    """The implementation of the layers (``transformer_engine`` or ``local``) and the device (``cuda`` or ``cpu``)."""

    layers: str = "transformer_engine"
    device: str = "cuda"


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a transformer layer on one rank; its properties are bytes.

    ``rows`` are rows of the pack, ``sp_rows`` those of them that sequence parallelism leaves this rank, and
    ``key_rows`` the rows of keys and values that attention without Transformer Engine reads.
    """

    rows: int
    sp_rows: int
    key_rows: int
    width: int
    query_width: int
    key_width: int
    heads: int
    ffn: int
    dtype_bytes: int
    batched: float  # as in `PackShape`
    kernels: Kernels
    attention_trains: bool = True  # the matrices, or adapters beside them
    mlp_trains: bool = True
    adapter_rank: int = 0
    has_bias: bool = False
    has_gate: bool = True
    has_head_norms: bool = False
    has_layer_norm: bool = False  # rather than RMSNorm
    shares_keys: bool = False  # query heads of attention without Transformer Engine share keys and values
    stores_fp8: bool = False  # inputs of matrix products are stored in FP8

    @property
    def is_on_cpu(self) -> bool:
        """Return whether the layer is ours and runs on a CPU."""
        return self.kernels == Kernels("local", "cpu")

    @property
    def input(self) -> int:
        """Return the bytes of a layer's input, [S, D]."""
        return self.sp_rows * self.width * self.dtype_bytes

    @property
    def norm_copies(self) -> int:
        """Return what our norm on a GPU stores beside its output and scale."""
        # It is two operations there: one stores a float32 copy of the rows, the other the normed rows.
        if self.kernels != Kernels("local", "cuda") or self.has_layer_norm:
            return 0
        element_bytes = FLOAT_BYTES + self.dtype_bytes
        return self.sp_rows * self.width * element_bytes

    def norm(self, trains: bool) -> int:
        """Return what a norm stores: its output, as the input of the product that follows, and its scale.

        ``trains`` says whether the product's matrix does, or an adapter beside it.
        """
        output = 0
        # A frozen matrix needs no gradient, so its input is not stored.
        if trains:
            output = self._stored_bytes(self.input)
        scale = self.sp_rows * FLOAT_BYTES
        if self.has_layer_norm:
            scale *= 2  # the mean, too
        if trains and self.adapter_rank:
            # The adapter normalises once more, and stores the narrow products of itself and of the one behind it.
            return output + self.norm_copies + 2 * scale + self.adapter_products
        return output + self.norm_copies + scale

    @property
    def adapter_products(self) -> int:
        """Return the bytes of the narrow products of two adapters: of up to three tensors before, of one behind."""
        return (3 * self.rows + self.sp_rows) * self.adapter_rank * self.dtype_bytes

    @property
    def attention(self) -> int:
        """Return what attention stores, with the fused product of query, key and value."""
        if self.kernels.layers == "transformer_engine":
            columns = 3 * self.query_width + 3 * self.key_width
            row_bytes = columns * self.dtype_bytes + self.heads * FLOAT_BYTES
            return self.rows * row_bytes + self._head_norms(keeps_product=True)
        is_view = not self.batched > 0 and self.shares_keys
        return self._local_attention() + self._head_norms(keeps_product=is_view)

    def _head_norms(self, keeps_product: bool) -> int:
        """Return what the norms of queries and keys store; their input is a view of the fused product."""
        if not self.has_head_norms:
            return 0
        head_dim = self.query_width // self.heads
        columns = self.query_width + self.key_width
        row_bytes = columns // head_dim * FLOAT_BYTES
        if not keeps_product:
            row_bytes += (columns + self.key_width) * self.dtype_bytes
        if self.kernels == Kernels("local", "cuda"):
            # As `norm_copies`.
            row_bytes += columns * (FLOAT_BYTES + self.dtype_bytes)
        return self.rows * row_bytes

    def _local_attention(self) -> int:
        query_width = self.query_width
        key_width = self.key_width
        is_batched = self.batched > 0
        key = key_width if self.shares_keys else query_width
        value = key
        if not is_batched and key == key_width:
            value = query_width + 2 * key_width  # a view of the fused product, which stays with it
        padding = self.batched or 1
        rows = self.rows * padding
        key_rows = self.key_rows * padding
        query_and_output = rows * 2 * query_width
        keys_and_values = key_rows * (key + value)
        # The output of a padded batch is copied back to the rows of the pack.
        unpadded_output = self.rows * query_width if is_batched else 0
        elements = query_and_output + keys_and_values + unpadded_output
        log_sum_exp = rows * self.heads * FLOAT_BYTES
        return int(elements * self.dtype_bytes + log_sum_exp)

    @property
    def inner(self) -> int:
        """Return the bytes of the input of the MLP's second matrix, [T, F]."""
        return self.rows * self.ffn * self.dtype_bytes

    @property
    def gate_up(self) -> int:
        """Return the bytes of the MLP's gate and up, [T, 2F]; without a gate [T, F]."""
        return 2 * self.inner if self.has_gate else self.inner

    @property
    def gate_product(self) -> int:
        """Return the bytes of gate times up, which the MLP's second matrix stores as its input."""
        if not self.mlp_trains:
            return 0
        return self._stored_bytes(self.inner)

    @property
    def mlp(self) -> int:
        """Return what the MLP stores, with the norm before it."""
        stored = self.norm(self.mlp_trains) + self.gate_up + self.gate_product
        if self.is_on_cpu and self.has_gate:
            stored += self.inner  # the activated gate, which is an operation of its own there
        return stored

    @property
    def all_stored(self) -> int:
        """Return the bytes that a layer stores without recomputation."""
        residual_stream = 2 * self.input
        return residual_stream + self.norm(self.attention_trains) + self.attention + self.mlp

    def _stored_bytes(self, size: int) -> int:
        """Return the bytes of a stored product input that takes ``size`` bytes in the parameters' dtype."""
        return size // self.dtype_bytes if self.stores_fp8 else size

    def stored(self, recompute: str) -> int:
        """Return the bytes that a layer stores between its forward and its backward pass."""
        recomputed = {
            "none": 0,
            "selective": self.mlp,
            "full": self.all_stored - self.input,
        }
        return self.all_stored - recomputed[recompute]

    def backward(self, recompute: str) -> int:
        """Return the peak transient bytes of the backward pass, beyond the stored activations."""
        recomputed = self.all_stored - self.stored(recompute)
        if recompute != "none":
            recomputed += 3 * self.input  # the recomputed part's input, its output and the gradient of the output
        mlp = self.inner  # gradient of the gate product; that of gate and up is written over them
        # When attention's turn comes, the MLP's activations are freed already.
        attention_columns = 3 * self.query_width + 2 * self.key_width
        attention_gradients = self.rows * attention_columns * self.dtype_bytes
        attention = attention_gradients - self.mlp
        return recomputed + self.input + max(mlp, attention)

    @property
    def forward(self) -> int:
        """Return the peak of a layer without gradients: its input, and the MLP's or attention's tensors."""
        qkv_copies = 2 if self.has_bias else 1
        if self.adapter_rank:
            qkv_copies += 1  # the product is there until the adapter's part is added to it
        qkv_columns = self.query_width + 2 * self.key_width
        qkv = qkv_copies * self.rows * qkv_columns * self.dtype_bytes
        attention = self.attention + qkv
        # The gate product; on a CPU the activated gate, too.
        products = self.gate_up if self.is_on_cpu else self.inner
        if self.adapter_rank:
            products = self.gate_up  # as of query, key and value
        mlp = self.gate_up + products
        return 3 * self.input + max(mlp, attention)
