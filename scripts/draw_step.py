"""The way of a few tokens through two steps, as the README tells it. A row of a pass gives the token that follows
its own: the verdict on a guess stands above the row before it."""

from scripts.svg import Drawing, Theme

WIDTH, HEIGHT = 720, 392
CLIENT, SAYS, TOP, DEPTH, BOTTOM, INPUT = 44, 92, 128, 248, 284, 292  # y of the lanes, downwards
CHIP_WIDTH, CHIP_HEIGHT = 48, 24
PITCH = 56  # of columns
FIRST, DRAFTS, SECOND = 92, 172, 414  # x of the passes and of the draft steps
STEPS = ((92, 380), (406, 712))  # from, to
GUESSES = (("The", "sky"), ("sky", "is"), ("is", "blue"))  # input, what the ramp says
ROWS = (("The", "sky"), ("sky", "is"), ("is", "clear"), ("blue", ""))  # input, what the full model says
DESC = (
    "In a step a verification pass runs all layers and gives the token The. Draft steps run the first blocks and a "
    "ramp each, and guess sky, is, blue. The controller releases sky, and holds is and blue. The client gets The and "
    "sky. In the next step one verification pass runs all layers over The, sky, is and blue, so that their keys and "
    "values are whole. It agrees with sky and is, and says clear in the place of blue. The client gets is and clear; "
    "blue is dropped. Then come draft steps again."
)


def draw(theme: Theme) -> str:
    drawing = Drawing(WIDTH, HEIGHT, theme, title="How one step works", desc=DESC)
    draw_lanes(drawing)
    draw_first_step(drawing)
    draw_second_step(drawing)
    draw_key(drawing)
    return drawing.svg()


def draw_lanes(drawing: Drawing) -> None:
    theme = drawing.theme
    for name, y in (("client", CLIENT), ("full model", SAYS), ("input", INPUT)):
        drawing.text((10, y + 17), name, color=theme.soft)
    drawing.text((10, TOP + 14), "last layer", color=theme.soft)
    drawing.text((10, DEPTH + 5), "depth k", color=theme.soft)
    for (left, right), name in zip(STEPS, ("step", "next step"), strict=True):
        drawing.text(((left + right) / 2, 20), name, anchor="middle", bold=True)
        drawing.line([(left, 28), (right, 28)], color=theme.soft)


def chip(drawing: Drawing, x: float, y: float, text: str, fill: str, *, is_dropped: bool = False) -> None:
    theme = drawing.theme
    drawing.rect((x, y), CHIP_WIDTH, CHIP_HEIGHT, fill=fill, stroke=theme.line)
    color = theme.bad if is_dropped else theme.text
    middle = (x + CHIP_WIDTH / 2, y + 17)
    drawing.text(middle, text, anchor="middle", color=color)
    if is_dropped:
        drawing.line([(x + 5, y + 13), (x + CHIP_WIDTH - 5, y + 13)], color=color, width=1.5)


def number(drawing: Drawing, x: float, y: float, value: int) -> None:
    drawing.add("circle", cx=x, cy=y, r=10, fill=drawing.theme.text)
    drawing.text((x, y + 5), str(value), anchor="middle", color=drawing.theme.back, bold=True)


def fill_of(theme: Theme, guess: str) -> str:
    return {"sky": theme.early, "is": theme.held, "blue": theme.held}.get(guess, theme.card)


def column(drawing: Drawing, x: float, top: float, fill: str) -> None:
    drawing.rect((x, top), CHIP_WIDTH, BOTTOM - top, fill=fill, stroke=drawing.theme.soft)


def draw_first_step(drawing: Drawing) -> None:
    theme = drawing.theme
    column(drawing, FIRST, TOP, theme.card)
    for line, text in enumerate(("all", "layers")):
        drawing.text((FIRST + CHIP_WIDTH / 2, 190 + 18 * line), text, anchor="middle")
    chip(drawing, FIRST, INPUT, "…", theme.card)
    chip(drawing, FIRST, SAYS, "The", theme.card)
    number(drawing, FIRST + CHIP_WIDTH / 2, TOP + 18, 1)
    for place, (given, guess) in enumerate(GUESSES):
        x = DRAFTS + PITCH * place
        column(drawing, x, DEPTH, theme.card)
        corners = [(x, DEPTH - 4), (x + 12, DEPTH - 22), (x + CHIP_WIDTH - 12, DEPTH - 22), (x + CHIP_WIDTH, DEPTH - 4)]
        drawing.polygon(corners, fill=theme.series[0])
        chip(drawing, x, INPUT, given, fill_of(theme, given))
        chip(drawing, x, 192, guess, fill_of(theme, guess))
    for text, y in (("ramp", DEPTH - 8), ("first", DEPTH + 17), ("blocks", DEPTH + 32)):
        drawing.text((DRAFTS + 3 * PITCH, y), text, color=theme.soft, size=13)
    number(drawing, DRAFTS - 12, DEPTH - 13, 2)
    number(drawing, DRAFTS + 3 * PITCH + 6, 204, 3)
    middle = DRAFTS + CHIP_WIDTH / 2
    drawing.arrow([(middle, 192), (middle, 160), (352, 160), (352, CLIENT + 26)], color=theme.good, width=2)
    drawing.text((middle + 8, 154), "released", color=theme.good)
    drawing.text((DRAFTS + 2 * PITCH - 4, 185), "held", color=theme.series[0], anchor="middle")
    drawing.arrow([(FIRST + CHIP_WIDTH, SAYS + 12), (300, SAYS + 12), (300, CLIENT + 26)], color=theme.soft)
    chip(drawing, 276, CLIENT, "The", theme.card)
    chip(drawing, 328, CLIENT, "sky", theme.early)
    number(drawing, 258, CLIENT + 12, 4)
    drawing.line([(DRAFTS + CHIP_WIDTH / 2, INPUT + 34), (SECOND - 30, INPUT + 34)], color=theme.soft, width=1.5)
    drawing.arrow([(SECOND - 30, INPUT + 34), (SECOND - 30, INPUT + 12), (SECOND - 6, INPUT + 12)], color=theme.soft)
    drawing.text((DRAFTS, INPUT + 52), "new token and exits join the next pass", color=theme.soft)


def draw_second_step(drawing: Drawing) -> None:
    theme = drawing.theme
    for place, (given, says) in enumerate(ROWS):
        x = SECOND + PITCH * place
        column(drawing, x, TOP, fill_of(theme, given))
        chip(drawing, x, INPUT, given, fill_of(theme, given), is_dropped=not says)
        if says:
            chip(drawing, x, SAYS, says, theme.card)
    right = SECOND + 3 * PITCH + CHIP_WIDTH
    middle = (SECOND + right) / 2
    drawing.rect((SECOND - 4, 168), right - SECOND + 8, 48, fill=theme.back, stroke=theme.soft)
    drawing.text((middle, 187), "all layers for each row:", anchor="middle")
    drawing.text((middle, 206), "its keys and values are whole", anchor="middle", size=13)
    number(drawing, SECOND + CHIP_WIDTH / 2, TOP + 18, 5)
    drawing.text((SECOND + CHIP_WIDTH / 2 + PITCH / 2, SAYS - 8), "agrees", color=theme.good, anchor="middle", size=13)
    drawing.text((SECOND + 2 * PITCH + CHIP_WIDTH / 2, SAYS - 8), "differs", color=theme.bad, anchor="middle", size=13)
    at = SAYS + 12
    drawing.arrow([(SECOND + 2 * PITCH + CHIP_WIDTH, at), (684, at), (684, CLIENT + 26)], color=theme.soft)
    chip(drawing, 608, CLIENT, "is", theme.held)
    chip(drawing, 660, CLIENT, "clear", theme.card)
    number(drawing, 590, CLIENT + 12, 6)
    drawing.rect((right + 14, DEPTH), 712 - right - 14, BOTTOM - DEPTH, fill=theme.card, stroke=theme.line)
    drawing.text(((right + 14 + 712) / 2, BOTTOM - 13), "drafts", anchor="middle", color=theme.soft)


def draw_key(drawing: Drawing) -> None:
    theme, x, y = drawing.theme, 92.0, HEIGHT - 22
    names = (("released exit", theme.early), ("held exit", theme.held), ("the full model's token", theme.card))
    for name, fill in names:
        drawing.rect((x, y - 14), 20, 16, fill=fill, stroke=theme.line)
        drawing.text((x + 28, y), name)
        x += 28 + 8 * len(name) + 24
