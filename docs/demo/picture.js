// Pictures for the network that was trained on CIFAR-10: of any size, or records of the data set.
"use strict";

const PICTURE_SIDE = 32;
const LARGEST_SIDE = 1024; // of what is averaged; the browser scales larger pictures to this first
const RECORD = 1 + 3 * PICTURE_SIDE * PICTURE_SIDE; // a label, then the pixels [3, 32, 32]
const TEST_RECORDS = 10000;
const MOST_RECORDS = 60000; // of the whole data set

/** A file that cannot be taken; the message names it. */
class Refused extends Error {}

const grouped = (n) => n.toLocaleString("en-US");

/**
 * The square middle of a picture, scaled to 32 x 32: every pixel is the mean of what it covers.
 * What is transparent is white.
 * @param {File} file In any format that the browser reads.
 * @returns {Promise<Uint8Array>} [3, 32, 32].
 */
async function pixelsOfPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Refused(
      `${file.name} cannot be read as a picture here. Open a JPEG, PNG or WebP file, or a .bin file of CIFAR-10.`);
  }
  const { width, height } = bitmap, square = Math.min(width, height);
  const side = Math.min(square, LARGEST_SIDE), canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, Math.floor((width - square) / 2), Math.floor((height - square) / 2),
    square, square, 0, 0, side, side);
  bitmap.close();
  return meansOfBlocks(context.getImageData(0, 0, side, side).data, side);
}

/** [side, side] pixels of four bytes, averaged over 32 x 32 equal parts. */
function meansOfBlocks(data, side) {
  const step = side / PICTURE_SIDE, area = step * step;
  const pixels = new Uint8Array(3 * PICTURE_SIDE * PICTURE_SIDE);
  // How much of pixel `at` lies in the part that begins at `from`.
  const covered = (at, from) => Math.min(at + 1, from + step) - Math.max(at, from);
  for (let y = 0, i = 0; y < PICTURE_SIDE; y++)
    for (let x = 0; x < PICTURE_SIDE; x++, i++) {
      const sum = [0, 0, 0], top = y * step, left = x * step;
      for (let row = Math.floor(top); row < Math.min(top + step, side); row++)
        for (let column = Math.floor(left); column < Math.min(left + step, side); column++) {
          const share = covered(row, top) * covered(column, left), at = 4 * (row * side + column);
          for (let c = 0; c < 3; c++) sum[c] += share * data[at + c];
        }
      for (let c = 0; c < 3; c++) pixels[c * PICTURE_SIDE * PICTURE_SIDE + i] = Math.round(sum[c] / area);
    }
  return pixels;
}

/**
 * Records of the test pictures that lie beside the page.
 * @param {{samples: string[], labels: number[]}} pictures PNG files in base64, and their classes.
 */
async function recordsOfPictures({ samples, labels }) {
  const pixels = await Promise.all(samples.map((sample) =>
    pixelsOfPicture(new Blob([bytesOf(sample)], { type: "image/png" }))));
  return { name: "test pictures of CIFAR-10", labels, pixels: (i) => pixels[i], thumbnails: samples };
}

/**
 * A file of CIFAR-10's binary version, such as test_batch.bin.
 * @param {File} file
 * @returns {Promise<{name: string, labels: Uint8Array, pixels: (index: number) => Uint8Array}>}
 */
async function readRecords(file) {
  const { name, size } = file, count = size / RECORD;
  const said = `${name} has ${grouped(size)} bytes`;
  const official = `test_batch.bin has ${grouped(TEST_RECORDS * RECORD)}`;
  if (count < 1 || !Number.isInteger(count) || count > MOST_RECORDS)
    throw new Refused(
      `${said}. Files of CIFAR-10's binary version have ${grouped(RECORD)} for each picture; ${official}.`);
  if (name === "test_batch.bin" && count !== TEST_RECORDS)
    throw new Refused(`${said}, but CIFAR-10's ${official}: it is incomplete.`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch (error) {
    throw new Refused(`${name} cannot be read: ${error.message}`);
  }
  const labels = Uint8Array.from({ length: count }, (_, i) => bytes[i * RECORD]);
  const odd = labels.findIndex((label) => label > 9);
  if (odd >= 0)
    throw new Refused(
      `${name} is damaged or no file of CIFAR-10: picture ${grouped(odd + 1)} has label ${labels[odd]}, not 0 to 9.`);
  return { name, labels, pixels: (i) => bytes.slice(i * RECORD + 1, (i + 1) * RECORD) };
}
