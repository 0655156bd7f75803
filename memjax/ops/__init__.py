"""The operations behind memory layers and experts; nothing here depends on models.

    product_key_search   which slots a query reads, and their scores
    embedding_bag        out[t] = sum_k weights[t, k] * table[indices[t, k]]
    embedding_dot        out[t, k] = <vectors[t], table[indices[t, k]]>, the transpose of the bag
    row_update           table rows <- optimizer(rows, gradient), in place, only the rows that were read
    grouped_matmul       out[i] = rows[i] @ matrices[group of i], rows in the order of their groups
    rms_norm             scale * x / sqrt(mean(x**2) + epsilon), and x, for the residual
    decode_attention     attention of a new token over a cache, each row with its own length
    matvec               rows @ x, gated or added to a residual, for decoding a single text

Each is a folder: `reference.py` is the definition, `xla.py` runs anywhere, in bounded memory where XLA lets it,
`triton.py` holds the kernels, or launches those of `triton_*.py`, `tiles.py` their tile sizes, `specs.py` the cases on
which implementations are compared, and `api.py` the public function (`memjax.embedding_bag` and so on).
"""
