import os
from unittest import mock

from memjax.evaluation.offline import forbid_downloads


def test_downloads_are_forbidden_unless_the_user_allows_them():
    with mock.patch.dict(os.environ):
        os.environ.pop("HF_HUB_OFFLINE", None)
        forbid_downloads()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        os.environ["HF_HUB_OFFLINE"] = "0"
        forbid_downloads()
        assert os.environ["HF_HUB_OFFLINE"] == "0"
