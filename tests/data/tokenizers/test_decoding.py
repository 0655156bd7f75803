from memjax.data.tokenizers.base import ByteTokenizer
from memjax.data.tokenizers.decoding import StreamingDecoder


def test_streaming_holds_a_character_back_until_its_last_byte():
    decoder = StreamingDecoder(ByteTokenizer())
    assert [decoder.push(byte + 3) for byte in "é!".encode()] == ["", "é", "!"]
    assert decoder.push(0xC3 + 3) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a") + 3) == "a"
