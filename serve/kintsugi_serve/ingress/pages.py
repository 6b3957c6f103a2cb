"""The pages for people: each is one file when it is sent, and loads nothing from elsewhere."""

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Awaitable, Callable

from fastapi import Response

# A part of a page, for example {{style.css}}.
_INLINED = re.compile(r"\{\{([a-z]+\.(?:css|js))\}\}")


def page(name: str) -> tuple[str, dict[str, str]]:
    """An HTML file of the package with its parts inlined, and headers that let only this inline code run."""
    folder = importlib.resources.files("kintsugi_serve") / "page"
    html = (folder / name).read_text(encoding="utf-8")
    html = _INLINED.sub(lambda part: (folder / part[1]).read_text(encoding="utf-8"), html)

    def allowed(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{value}'" for value in hashes)

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}


def page_route(name: str) -> Callable[[], Awaitable[Response]]:
    html, headers = page(name)

    async def show() -> Response:
        return Response(html, headers=headers, media_type="text/html")

    return show
