"""The transformers config of a decoder with memory layers exported by memjax.

Part of memjax, under the Apache License 2.0. Exported folders contain a copy, so that they do not need memjax.
"""

from transformers import PretrainedConfig


class MemjaxConfig(PretrainedConfig):
    """memjax's settings of the model, and its sizes under the names that transformers expects."""

    model_type = "memjax"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  transformers names it so

    def __init__(self, model=None, table_device="cuda", max_position_embeddings=2048, use_cache=True, **kwargs):
        """The arguments are the content of config.json.

        Args:
            model: memjax's settings of the model, from which the other sizes are derived.
            table_device: `cuda` keeps the tables with the rest of the model; `cpu` keeps them in main memory, where
                rows are read and summed, so that only one row per token is transferred.
            max_position_embeddings: context length in tokens.
            use_cache: whether generation keeps keys and values.
            **kwargs: other arguments of PretrainedConfig.
        """
        if model is None:
            raise ValueError("model=None must hold the settings of a model, as in the config.json that memjax writes")
        if table_device not in ("cuda", "cpu"):
            raise ValueError(f"table_device={table_device!r} must be cuda or cpu")
        # The vocabulary is the only size that transformers changes (resize_token_embeddings).
        self.vocab_size = kwargs.pop("vocab_size", model["vocab_size"])
        self.model = {**model, "vocab_size": self.vocab_size}
        self.table_device = table_device
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.hidden_size = model["dim"]
        self.intermediate_size = model["ffn_dim"]
        self.num_hidden_layers = model["num_layers"]
        self.num_attention_heads = model["num_heads"]
        self.num_key_value_heads = model["num_kv_heads"] or model["num_heads"]
        self.head_dim = model["head_dim"] or model["dim"] // model["num_heads"]
        self.rms_norm_eps = model["norm_eps"]
        self.sliding_window = model["sliding_window"]
        window = "full_attention" if self.sliding_window is None else "sliding_attention"
        self.layer_types = [window] * self.num_hidden_layers
        derived = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        derived += ("num_key_value_heads", "rms_norm_eps", "sliding_window", "layer_types", "tie_word_embeddings")
        kwargs = {name: value for name, value in kwargs.items() if name not in derived}
        super().__init__(tie_word_embeddings=model["tie_embeddings"], **kwargs)

    def to_dict(self):
        """The content of config.json, with the same vocabulary size in both places."""
        content = super().to_dict()
        content["model"] = {**content["model"], "vocab_size": content["vocab_size"]}
        return content
