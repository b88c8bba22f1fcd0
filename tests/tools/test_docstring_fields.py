"""What the reference of the docs site makes of this repository's docstrings."""

import pytest

griffe = pytest.importorskip("griffe", reason="griffe is not installed: pip install -r requirements-docs.txt")

CODE = '''
class Method:
    """A method.

    Fields beside the other's:
        tau1, tau2: thresholds.
        order: of the forecast.
    """

    def run(self, first, second):
        """Run.

        Args:
            first, second: numbers.
        """
'''


def test_fields_become_attributes_and_names_stay_together():
    from tools.docstring_fields import UNBROKEN, Fields

    with griffe.temporary_visited_package(
        "package", {"__init__.py": CODE}, extensions=griffe.load_extensions(Fields)
    ) as module:
        _, attributes = module["Method"].docstring.parse("google")
        _, arguments = module["Method.run"].docstring.parse("google", warn_unknown_params=False)
    assert attributes.kind is griffe.DocstringSectionKind.attributes
    described = [(each.name, each.description) for each in attributes.value]
    assert described == [(f"tau1,{UNBROKEN}tau2", "thresholds."), ("order", "of the forecast.")]
    assert [each.name for each in arguments.value] == [f"first,{UNBROKEN}second"]
