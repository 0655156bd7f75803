"""How prompts that are too long are truncated."""

from memjax.config.sampling import SamplingConfig
from memjax.data.tokenizers.base import ByteTokenizer
from memjax.evaluation import model as model_module
from memjax.evaluation.model import EvalModel, Written


def test_prompts_keep_at_least_half_of_what_the_model_sees(drawn_model, monkeypatch):
    model = EvalModel(model=drawn_model, tokenizer=ByteTokenizer(), max_length=32, batch_size=4)
    rooms, shares = [], []

    def continue_texts(model, tokenizer, prompts, *, max_prompt_tokens, **_):
        rooms.append(max_prompt_tokens)
        return [Written(prompt.upper(), False) for prompt in prompts]

    monkeypatch.setattr(model_module, "continue_texts", continue_texts)
    prompts = ["b" * 11, "c" * 30, "a"]
    for max_tokens in (8, 400):
        found = model.write(prompts, max_tokens=max_tokens, stop=(), sampling=SamplingConfig(), show=shares.append)
        assert [text for text, _ in found] == [prompt.upper() for prompt in prompts]
        # The begin token counts, too.
        assert [is_cut for _, is_cut in found] == [False, True, False]
    assert rooms == [24, 16]
    assert shares == [1 / 3, 2 / 3, 1] * 2
