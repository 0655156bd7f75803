from memjax.training.compiler import compiler_options


def test_only_gpus_get_options_and_the_users_flags_are_kept(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options("cpu", 2) is None
    alone, several = compiler_options("gpu", 1), compiler_options("gpu", 2)
    assert alone == {"xla_gpu_enable_triton_gemm": False}
    assert several == {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiler_options("gpu", 1) == {}
