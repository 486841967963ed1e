"""Settings of Sphinx: ``make docs``. Nothing is fetched when it builds."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # examples run side by side
sys.path.insert(0, str(HERE / "_ext"))

import sklearn_backdoor  # noqa: E402

project = "sklearn_backdoor"
author = "the sklearn_backdoor developers"
copyright = author
version = release = sklearn_backdoor.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "helpers",
]
exclude_patterns = ["_build", "_templates", "_ext", "gallery"]
templates_path = ["_templates"]
default_role = "py:obj"  # `fit` links where there is a page for it

autosummary_generate = True
autodoc_default_options = {
    "members": True,
    "inherited-members": True,
}
autodoc_typehints = "none"
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_examples",
    "backreferences_dir": "api/backreferences",
    "doc_module": ("sklearn_backdoor",),
    "within_subsection_order": "helpers.gallery_order",
    "parallel": 2,
    "abort_on_example_error": True,
    "download_all_examples": False,
    "write_computation_times": False,  # its page loads scripts from elsewhere
    "show_signature": False,
    "remove_config_comments": True,
    "image_srcset": ["2x"],
}

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": project},
    "show_prev_next": True,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
}
html_sidebars = {"start": [], "notation": [], "benchmarks": [], "contributing": []}
