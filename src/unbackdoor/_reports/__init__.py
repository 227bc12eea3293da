"""The pages about a purification and about its stress: numbers first, one self-contained HTML file after."""

from unbackdoor._reports.answers_page import Answering as Answering
from unbackdoor._reports.answers_page import build_answers as build_answers
from unbackdoor._reports.page import Contender as Contender
from unbackdoor._reports.page import Page as Page
from unbackdoor._reports.page import build as build
from unbackdoor._reports.render import render as render
from unbackdoor._reports.render import render_answers as render_answers
from unbackdoor._reports.render import render_stress as render_stress
from unbackdoor._reports.stress_page import StressPage as StressPage
from unbackdoor._reports.stress_page import build_stress as build_stress
