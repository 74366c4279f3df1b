"""Names that uploads give themselves, against the nodes that they come from."""

import pytest

from fedmitr_flwr.federation.roster import Roster
from fedmitr_flwr.federation.uploads.validation import UploadRefused
from fedmitr_flwr.settings import Settings, SettingsError


def test_a_site_may_use_its_own_name_only():
    roster = Roster("north=11,south=12")
    roster.check(11, "north")
    with pytest.raises(UploadRefused, match="claims to be south, but node 11 is north"):
        roster.check(11, "south")


def test_a_node_that_is_not_listed_is_refused():
    with pytest.raises(UploadRefused, match=r"node 13 is not in run\.roster"):
        Roster("north=11").check(13, "north")


def test_without_a_roster_any_name_will_do():
    Roster("").check(13, "anything")


@pytest.mark.parametrize("text", ["north=11,south=11", "north=11,north=12"])
def test_ambiguous_rosters_are_refused(text: str):
    with pytest.raises(SettingsError, match=r"run\.roster"):
        Roster(text)


@pytest.mark.parametrize("text", ["north", "north=", "=11", "north=11,", "north=x"])
def test_malformed_rosters_are_refused_with_the_settings(text: str):
    with pytest.raises(SettingsError, match=r"run\.roster"):
        Settings.from_run_config({"run.roster": text})
