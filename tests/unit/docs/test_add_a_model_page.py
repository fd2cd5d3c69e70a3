"""docs/how-to/add-a-model.md: its files are installed, its tests and commands are run."""

import importlib

import pytest

PAGE = "how-to/add-a-model.md"


def test_the_commands_print_what_the_page_says(opened):
    opened.run()
    assert list(opened.folder.glob("runs/*/summary.json"))


@pytest.mark.parametrize(
    "name",
    [
        "test_images_become_one_row_of_outputs_each",
        "test_a_row_s_output_does_not_depend_on_its_neighbours",
        "test_it_can_be_trained_with_record_level_dp",
        "test_groups_that_do_not_divide_the_channels_are_refused",
    ],
)
def test_the_page_s_tests_pass(opened, name):
    getattr(importlib.import_module("test_resnet"), name)()
