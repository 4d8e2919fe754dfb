from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.state import sorted_keys
from mesh.state.sorted_keys import SortedKeys

keys = st.text(st.sampled_from("ab/"), max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(keys), st.lists(keys), st.lists(keys))
def test_sorted_keys_agree_with_a_set(initial: list[str], added: list[str], removed: list[str]) -> None:
    limit, sorted_keys.BUCKET_KEYS_MAX = sorted_keys.BUCKET_KEYS_MAX, 4
    try:
        tested, naive = SortedKeys(initial), set(initial)
        for key in added:
            if key not in naive:
                tested.add(key)
                naive.add(key)
        for key in removed:
            if key in naive:
                tested.remove(key)
                naive.remove(key)
            for prefix in {key, key[:1], ""}:
                assert list(tested.with_prefix(prefix)) == sorted(one for one in naive if one.startswith(prefix))
        assert list(tested) == sorted(naive)
        assert len(tested) == len(naive)
    finally:
        sorted_keys.BUCKET_KEYS_MAX = limit
