"""The page about a purification: numbers first, one self-contained HTML file after."""

from unbackdoor._report._numbers import Contender as Contender
from unbackdoor._report._numbers import Page as Page
from unbackdoor._report._numbers import build as build
from unbackdoor._report._render import render as render
