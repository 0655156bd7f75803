"""Tests a running server with the official `openai` package: completions, streams, log-probabilities and errors.

    pip install openai
    python -m memjax.serve runs/quickstart                      # in another terminal
    python experiments/references/openai_client.py              # or with --url http://HOST:PORT/v1

If the server requires a key, it is taken from the environment variable MEMJAX_API_KEY. The exit code is 1 if any check
fails.
"""

import argparse
import os
import sys

import openai


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="What is the major of")
    arguments = parser.parse_args()
    key = os.environ.get("MEMJAX_API_KEY", "none")
    client = openai.OpenAI(base_url=arguments.url, api_key=key, max_retries=0)
    model = client.models.list().data[0].id
    asked = {"model": model, "prompt": arguments.prompt, "max_tokens": 24}
    failed = 0

    def check(what: str, is_so: bool) -> None:
        nonlocal failed
        failed += not is_so
        print(f"{'ok    ' if is_so else 'FAILED'} {what}", flush=True)

    greedy = client.completions.create(**asked, temperature=0)
    text = greedy.choices[0].text
    print(repr(arguments.prompt + text))
    check("a completion has text, a reason to end and its usage", bool(text) and greedy.usage.completion_tokens <= 24)
    drawn = [client.completions.create(**asked, seed=5).choices[0].text for _ in range(2)]
    check("a seed repeats a text", drawn[0] == drawn[1])

    events = list(client.completions.create(**asked, seed=5, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(choice.text for event in events for choice in event.choices)
    check("a stream adds up to the text", streamed == drawn[0])
    check("a stream ends with its usage", events[-1].usage.completion_tokens > 0)

    several = client.completions.create(**{**asked, "prompt": [arguments.prompt, "A"]}, seed=5, n=2)
    check("prompts and choices are numbered", [one.index for one in several.choices] == [0, 1, 2, 3])
    check("a text is the one that its prompt gets alone", several.choices[0].text == drawn[0])

    likely = client.completions.create(**asked, temperature=0, logprobs=3, echo=True).choices[0]
    check("echo gives the prompt back", likely.text == arguments.prompt + text)
    tops = zip(likely.logprobs.token_logprobs, likely.logprobs.top_logprobs, strict=True)
    check("each token is among its likeliest or beside them", all(one in top.values() for one, top in tops if top))

    stop = text[len(text) // 2 :][:3]
    stopped = client.completions.create(**asked, temperature=0, stop=[stop]).choices[0]
    check("a stop string ends a text", stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop")
    extra = client.completions.create(**asked, extra_body={"top_k": 1, "repetition_penalty": 1.0}).choices[0].text
    check("top_k=1 is greedy", extra == text)

    stream = client.completions.create(**asked, stream=True)
    next(iter(stream))
    stream.close()
    check(
        "a stream that is closed does no harm",
        client.completions.create(**asked, temperature=0).choices[0].text == text,
    )

    for what, error, body in (
        ("a wrong value is a BadRequestError with the field", openai.BadRequestError, {"temperature": 5}),
        ("a foreign model is a NotFoundError", openai.NotFoundError, {"model": "gpt-2"}),
    ):
        try:
            client.completions.create(**asked | body)
        except error as found:
            check(what, found.param == next(iter(body)))
        else:
            check(what, False)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
