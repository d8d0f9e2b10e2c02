"""Sphinx configuration: `sphinx-build -W docs docs/_build`."""

import re
import shutil
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

import adam_jax

project = "adam_jax"
author = "the adam_jax authors"
copyright = author
version = release = adam_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

# Furo: navigation on the left, the page's contents on the right, both drawers on a phone; light and
# dark by the reader's system; all in a few kilobytes of its own files, with nothing fetched from
# elsewhere. Of the others that are kept as well, PyData's and the Book theme load Bootstrap and
# icon fonts, and wrap what a small project has in a navigation bar for a large one.
html_theme = "furo"
html_title = f"adam_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options = {"top_of_page_buttons": []}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
autosummary_generate = False
exclude_patterns = ["_build"]
default_role = "code"
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True


def equations_as_written(app, what, name, obj, options, lines):
    """Docstrings are written to be read in a terminal: indented equations become literal blocks,
    and |x| is no reference.
    """
    done, literal = [], False
    for line in lines:
        indented = re.match(r" {4,}\S", line)
        opens_section = done and re.fullmatch(
            r"(Args|Returns|Raises|Attributes|Source):", _last(done)
        )
        if (
            indented
            and not literal
            and done
            and not done[-1].strip()
            and not opens_section
            and not _in_section(done)
        ):
            done += ["::", ""]
            literal = True
        elif line.strip() and not line.startswith(" "):
            literal = False
        done.append(line if literal else line.replace("|", r"\|"))
    lines[:] = done


def _last(lines):
    return next((line for line in reversed(lines) if line.strip()), "")


def _in_section(lines):
    """Whether the last unindented line opened a Google-style section."""
    heads = [line for line in lines if line.strip() and not line.startswith(" ")]
    return bool(heads) and heads[-1] in {"Args:", "Returns:", "Raises:", "Attributes:"}


# Equations become MathML when the site is built: every browser of today draws it, in the colour and
# at the size of the text around it. MathJax would be fetched from another server, or be two
# megabytes here; images need LaTeX and cannot turn dark.
def _mathml(display):
    def visit(self, node):
        mathml = latex2mathml.converter.convert(node.astext(), display=display)
        self.body.append(f'<div class="math">{mathml}</div>' if display == "block" else mathml)
        raise nodes.SkipNode

    return visit


def drawings_in_the_page(app, doctree, docname):
    """An SVG in the page itself has the page's colours, light or dark; as an image, which it is on
    GitHub, it could not.
    """
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].endswith(".svg"):
            svg = (Path(app.srcdir) / image["uri"]).read_text(encoding="utf-8")
            paragraph = image.parent
            paragraph.parent.replace(paragraph, nodes.raw("", svg, format="html"))


def figures_of_notebooks(app, doctree, docname):
    """What a cell draws has no text for those who cannot see it: what is said of it right below it
    is that.
    """
    for image in doctree.findall(nodes.image):
        below = image.next_node(nodes.paragraph, ascend=True)
        if "alt" not in image and below:
            image["alt"] = below.astext()


def bring_notebooks(app):
    """Sphinx sees nothing outside its source: the notebooks, outputs and all, are copied in before
    it looks.
    """
    here = Path(app.srcdir, "notebooks")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(
        Path(app.srcdir).parent / "notebooks", here, ignore=shutil.ignore_patterns("*.md", ".*")
    )


def setup(app):
    app.connect("builder-inited", bring_notebooks)
    app.connect("autodoc-process-docstring", equations_as_written, priority=100)
    app.connect("doctree-resolved", drawings_in_the_page)
    app.connect("doctree-resolved", figures_of_notebooks)
    app.add_html_math_renderer("mathml", (_mathml("inline"), None), (_mathml("block"), None))
