import pytest
import torch

from ldm_cli.pictures.grid import image_grid, labelled_grid


def pictures(count, height=128, width=128):
    return [torch.full((3, height, width), i, dtype=torch.uint8) for i in range(count)]


def test_grid_places_pictures_row_by_row_on_white():
    grid = image_grid(pictures(3, 128, 200), columns=2)
    expected = torch.full((3, 260, 404), 255, dtype=torch.uint8)
    expected[:, :128, :200], expected[:, :128, 204:], expected[:, 132:, :200] = 0, 1, 2
    assert torch.equal(grid, expected)
    with pytest.raises(ValueError, match="empty"):
        image_grid([])


@pytest.mark.parametrize(("size", "factor"), [(16, 8), (48, 3), (127, 2), (128, 1), (512, 1)])
def test_small_pictures_are_enlarged_by_a_whole_factor(size, factor):
    picture = torch.randint(0, 256, (3, size, 2 * size), dtype=torch.uint8)
    grid = image_grid([picture])
    assert grid.shape == (3, factor * size, 2 * factor * size)
    assert torch.equal(grid[:, ::factor, ::factor], picture)
    assert torch.equal(grid[:, factor - 1 :: factor, factor - 1 :: factor], picture)


def test_pictures_of_two_sizes_keep_their_proportion():
    grid = image_grid([*pictures(1, 64, 64), *pictures(2, 32, 32)[1:]])
    assert grid.shape == (3, 128, 260)
    assert int((grid == 1).sum()) == 3 * 64 * 64


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (7, 3, 3), (64, 8, 8)])
def test_a_grid_without_columns_is_nearly_square(count, rows, columns):
    assert image_grid(pictures(count)).shape == (3, 132 * rows - 4, 132 * columns - 4)


def test_labels_stand_above_the_columns_and_left_of_the_rows():
    columns, rows = ("2", "20"), ("1.5", "a label that is wrapped within some lines")
    images = pictures(4)
    grid, table = image_grid(images, 2), labelled_grid(images, columns, rows, ("steps", "scale"), "a circle, seed 0")
    top, left = table.shape[1] - grid.shape[1], table.shape[2] - grid.shape[2]
    assert torch.equal(table[:, top:, left:], grid)
    dark = table[0] < 100
    assert dark[:top, left : left + 128].any()
    assert dark[:top, left + 132 :].any()
    assert dark[top : top + 128, :left].any()
    assert dark[top + 132 :, :left].any()
    assert not dark[top + 128 : top + 132, :left].any()


@pytest.mark.parametrize("side", [16, 48])
def test_a_table_of_small_pictures_is_that_of_the_enlarged_ones(side):
    small = [torch.randint(0, 256, (3, side, 2 * side), dtype=torch.uint8) for _ in range(2)]
    large = [image_grid([picture]) for picture in small]
    texts = (("2", "20"), ("1.5",), ("steps", "scale"), "a circle")
    assert torch.equal(labelled_grid(small, *texts), labelled_grid(large, *texts))


def test_a_table_without_column_labels_names_no_axis_and_keeps_its_columns_in_place():
    first, second = (
        labelled_grid(pictures(2), columns, ("1.5",), ("steps", "scale"), "a circle")
        for columns in (("2", "20"), ("", ""))
    )
    assert first.shape[2] == second.shape[2]
    assert first.shape[1] > second.shape[1]


def test_labels_of_any_length_and_script_leave_the_pictures_whole():
    images, label = pictures(1), "\u732b \x1b[31m " * 200
    table = labelled_grid(images, [label], [label], ("x", "y"), label)
    assert torch.equal(table[:, -128:, -128:], images[0])
    assert max(table.shape) < 600
