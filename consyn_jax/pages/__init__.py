"""The HTML template that the report pages of runs, corpora and evaluations share."""

from consyn_jax.pages.html_page import escape as escape
from consyn_jax.pages.html_page import html_page as html_page
from consyn_jax.pages.html_page import unbroken as unbroken
