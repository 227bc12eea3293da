"""The pages about a purification and about its stress: numbers first, one self-contained HTML file after."""

from unbackdoor._report._numbers import Contender as Contender
from unbackdoor._report._numbers import Page as Page
from unbackdoor._report._numbers import build as build
from unbackdoor._report._render import render as render
from unbackdoor._report._render import render_stress as render_stress
from unbackdoor._report._stress_numbers import StressPage as StressPage
from unbackdoor._report._stress_numbers import build_stress as build_stress
