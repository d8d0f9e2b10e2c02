"""Looks at the built site in a real browser: `python docs/check_site.py docs/_build [--screenshots
DIR]`.

Serves the site on localhost and visits every page at desktop and phone width, light and dark, in
Chromium. Fails for

- a message in the console, an error of a script, a request that fails or leaves the site
- a link or an anchor that leads nowhere
- a page that is wider than the window (tables, code and equations may scroll in boxes of their own)
- text below 4.5 : 1 in contrast, 3 : 1 where it is large (WCAG 2, AA), or smaller than 10 px
- code without a button that copies it, a button that copies something else
- an image without a text in its place
- a search that does not find its page

Needs `pip install -e ".[docs]"` and a Chromium of the system. Where there is none it says so and
succeeds."""

import argparse
import contextlib
import functools
import http.server
import importlib.util
import re
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
LEFT = {"net::ERR_ABORTED", "net::ERR_FAILED"}
SEARCHES = {
    "storage": "low-precision.html",
    "ZeRO": "scaling-out.html",
    "track_moments": "api.html",
}

# What a page says of itself, once it is drawn. Colours are composited over all backgrounds below,
# as the eye sees them.
INSPECT = (Path(__file__).parent / "inspect_page.js").read_text(encoding="utf-8")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *args):
        pass


class Visit:
    """One browser window: what goes wrong in it is written to `problems`."""

    def __init__(self, browser, root, look, scheme, problems):
        width, height = WIDTHS[look]
        self.root, self.problems, self.name, self.at = root, problems, f"{look}, {scheme}", ""
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.context.route("**/*", self._request)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.page.on(
            "console", lambda m: m.type in {"error", "warning"} and self.say(f"console: {m.text}")
        )
        self.page.on("pageerror", lambda error: self.say(f"script: {error}"))
        # What is abandoned as the next page opens has not failed, and what `_request` refuses is
        # said there.
        self.page.on(
            "requestfailed",
            lambda r: r.failure not in LEFT and self.say(f"request failed: {r.url}: {r.failure}"),
        )
        self.page.on("response", lambda r: r.status >= 400 and self.say(f"{r.status}: {r.url}"))

    def say(self, problem):
        self.problems.append(f"{self.at} ({self.name}): {problem}")

    @contextlib.contextmanager
    def reporting(self):
        """What the browser cannot do, within 20 s, is a problem as well."""
        from playwright.sync_api import Error

        try:
            yield
        except Error as error:
            self.say(str(error))

    def _request(self, route):
        if route.request.url.startswith((self.root, "data:", "blob:")):
            route.continue_()
        else:
            self.say(f"leaves the site: {route.request.url}")
            route.abort()

    def open(self, page):
        self.at = page
        self.page.goto(f"{self.root}{page}", wait_until="load")

    def inspect(self):
        """What `INSPECT` finds, its problems said."""
        found = self.page.evaluate(INSPECT)
        for problem in found["problems"]:
            self.say(problem)
        return found

    def copy(self):
        """The first piece of code, copied by its button, is what stands there, without prompts."""
        code = self.page.locator("article div.highlight").first
        code.hover()
        code.locator("button.copybtn").click()
        copied, shown = (
            self.page.evaluate("navigator.clipboard.readText()"),
            code.locator("pre").inner_text(),
        )
        if copied.strip() != re.sub(r"^(>>> |\.\.\. |\$ )", "", shown, flags=re.M).strip():
            self.say(f"copies {copied!r} of {shown!r}")

    def search(self, words, expected):
        self.open(f"search.html?q={words}")
        self.page.wait_for_selector(
            f"#search-results li a[href*='{expected}']"
        )  # results come one by one
        self.page.wait_for_load_state("networkidle")
        self.inspect()


def broken(root, built, links, ids):
    """Links, as (page, address), to what the site does not have;

    `ids` are the anchors of each page.
    """
    for page, link in sorted(links):
        address = urlsplit(link)
        if not link.startswith(root):
            continue
        target, anchor = (
            unquote(address.path).lstrip("/") or "index.html",
            unquote(address.fragment),
        )
        if target in ids:
            if anchor and anchor not in ids[target]:
                yield f"{page}: no anchor #{anchor} in {target}"
        elif not (built / target).is_file():
            yield f"{page}: no page {target}"


def check(built, chromium, screenshots=None):
    """The problems of the site in the folder `built`, and how many pages it has."""
    from playwright.sync_api import sync_playwright

    pages = sorted(
        str(path.relative_to(built))
        for path in built.rglob("*.html")
        if "_static" not in path.parts
    )
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(built))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    problems, links, ids = [], set(), {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for look in WIDTHS:
            for scheme in SCHEMES:
                visit = Visit(browser, root, look, scheme, problems)
                for page in pages:
                    with visit.reporting():
                        visit.open(page)
                        found = visit.inspect()
                        ids[page] = set(found["ids"])
                        links |= {(page, link) for link in found["links"]}
                        if screenshots:
                            picture = f"{page.replace('/', '-')}.png"
                            visit.page.screenshot(
                                path=screenshots / f"{look}-{scheme}" / picture, full_page=True
                            )
                for words, expected in SEARCHES.items():
                    with visit.reporting():
                        visit.search(words, expected)
                with visit.reporting():
                    visit.open("get-started.html")
                    visit.copy()
                visit.context.close()
        browser.close()
    server.shutdown()
    return problems + list(broken(root, built, links, ids)), len(pages)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("built", type=Path, help="folder of the built site")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of every page")
    parser.add_argument(
        "--chromium",
        default=shutil.which("chromium") or shutil.which("chromium-browser"),
        help="the browser",
    )
    args = parser.parse_args()
    if not (args.built / "index.html").is_file():
        sys.exit(
            f"check_site: found no index.html in {args.built}; expected a built site. Run "
            f"sphinx-build -W docs {args.built}"
        )
    if args.chromium is None:
        print(
            "check_site: skipped: no chromium on this machine; on Debian, `apt-get install "
            "chromium`"
        )
        return
    if not importlib.util.find_spec("playwright"):
        sys.exit(
            'check_site: found no playwright; expected the extra "docs". '
            'Run pip install -e ".[docs]"'
        )
    problems, pages = check(args.built.resolve(), args.chromium, args.screenshots)
    print(*problems, sep="\n")
    if problems:
        sys.exit(f"check_site: {len(problems)} problems on {pages} pages")
    print(f"check_site: {pages} pages, {len(WIDTHS) * len(SCHEMES)} times each, and nothing wrong")


if __name__ == "__main__":
    main()
