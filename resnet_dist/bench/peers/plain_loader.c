/* The floor of a loader on a CPU: bare libjpeg-turbo, and around it plain C for one thread. */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <jpeglib.h>

enum { CHANNELS = 3, WEIGHT_BITS = 14, MAX_PX = 1024, MAX_TAPS = 64 };

struct guard {
    struct jpeg_error_mgr manager;
    jmp_buf caller;
};

static void leave(j_common_ptr info) { longjmp(((struct guard *)info->err)->caller, 1); }
static void be_silent(j_common_ptr info) { (void)info; }

/* Decodes a window of a JPEG.
 *
 * window: top, left, bottom, right, inside the image. pixels: has room for 4 bytes per pixel of the
 * whole image. size: receives the rows and columns in `pixels`, and the window's first column in
 * there, because libjpeg decodes whole blocks. Returns 0, or 1 if libjpeg rejects the data. */
int decode_window(const unsigned char *data, unsigned long nbytes, const int *window,
                  unsigned char *pixels, int *size) {
    struct jpeg_decompress_struct info;
    struct guard guard;
    info.err = jpeg_std_error(&guard.manager);
    guard.manager.error_exit = leave;
    guard.manager.output_message = be_silent;
    if (setjmp(guard.caller)) {
        jpeg_destroy_decompress(&info);
        return 1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, (unsigned char *)data, nbytes);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = info.num_components == 4 ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&info);
    /* The window refers to the image as EXIF orients it, so it may exceed the stored frame. */
    JDIMENSION top = window[0] < (int)info.output_height ? window[0] : 0;
    JDIMENSION first = window[1] < (int)info.output_width ? window[1] : 0;
    JDIMENSION bottom = window[2] < (int)info.output_height ? window[2] : info.output_height;
    JDIMENSION right = window[3] < (int)info.output_width ? window[3] : info.output_width;
    JDIMENSION left = first, width = right - left;
    jpeg_crop_scanline(&info, &left, &width); /* widened to whole blocks */
    jpeg_skip_scanlines(&info, top);
    while (info.output_scanline < bottom) {
        JSAMPROW row = pixels;
        jpeg_read_scanlines(&info, &row, 1);
        pixels += (size_t)info.output_width * info.output_components;
    }
    size[0] = bottom - top;
    size[1] = info.output_width;
    size[2] = first - left;
    jpeg_abort_decompress(&info);
    jpeg_destroy_decompress(&info);
    return 0;
}

/* The triangle filter from `from` to `to` pixels: each output's first input, its number of inputs,
 * and their weights, which add up to 1 << WEIGHT_BITS, up to rounding. */
struct filter {
    int first[MAX_PX], taps[MAX_PX];
    int16_t weights[MAX_PX][MAX_TAPS];
};

static int make_filter(struct filter *filter, int from, int to) {
    double scale = (double)from / to, reach = scale > 1 ? scale : 1;
    if (to > MAX_PX || 2 * reach + 2 > MAX_TAPS) return 1;
    for (int i = 0; i < to; i++) {
        double center = scale * (i + 0.5), total = 0, weights[MAX_TAPS];
        int start = (int)(center - reach + 0.5), end = (int)(center + reach + 0.5);
        if (start < 0) start = 0;
        if (end > from) end = from;
        for (int j = start; j < end; j++) {
            double weight = 1 - fabs((j - center + 0.5) / reach);
            total += weights[j - start] = weight > 0 ? weight : 0;
        }
        filter->first[i] = start;
        filter->taps[i] = end - start;
        for (int j = 0; j < end - start; j++)
            filter->weights[i][j] = (int16_t)lrint(weights[j] / total * (1 << WEIGHT_BITS));
    }
    return 0;
}

static inline unsigned char rounded(int sum) {
    int level = sum >> WEIGHT_BITS;
    return level < 0 ? 0 : level > 255 ? 255 : level;
}

/* Does the whole work for one image: decodes the window, resizes it with antialiasing, flips and
 * normalizes it.
 *
 * scratch: has room for 4 bytes per pixel of the whole image, and 3 bytes for each of its rows times
 * `width`. levels: [3], scale; [3], bias. out: [height, width, 3]. Returns 0, or 1 if it cannot. */
int load_window(const unsigned char *data, unsigned long nbytes, const int *window, int flip,
                int height, int width, const float *levels, unsigned char *scratch, float *out) {
    static _Thread_local struct filter across, down;
    int size[3];
    if (decode_window(data, nbytes, window, scratch, size)) return 1;
    int rows = size[0], columns = window[3] - window[1];
    if (make_filter(&across, columns, width) || make_filter(&down, rows, height)) return 1;
    unsigned char *narrow = scratch + (size_t)CHANNELS * rows * size[1];
    for (int y = 0; y < rows; y++) {
        const unsigned char *row = scratch + CHANNELS * ((size_t)y * size[1] + size[2]);
        unsigned char *to = narrow + (size_t)CHANNELS * y * width;
        for (int x = 0; x < width; x++) {
            const unsigned char *from = row + CHANNELS * across.first[x];
            const int16_t *weights = across.weights[x];
            int red = 1 << (WEIGHT_BITS - 1), green = red, blue = red;
            for (int tap = 0; tap < across.taps[x]; tap++, from += CHANNELS) {
                red += weights[tap] * from[0];
                green += weights[tap] * from[1];
                blue += weights[tap] * from[2];
            }
            int at = CHANNELS * (flip ? width - 1 - x : x);
            to[at] = rounded(red);
            to[at + 1] = rounded(green);
            to[at + 2] = rounded(blue);
        }
    }
    float scale[CHANNELS * MAX_PX], bias[CHANNELS * MAX_PX];
    for (int i = 0; i < CHANNELS * width; i++) {
        scale[i] = levels[i % CHANNELS];
        bias[i] = levels[CHANNELS + i % CHANNELS];
    }
    for (int y = 0; y < height; y++) {
        int sums[CHANNELS * MAX_PX];
        for (int i = 0; i < CHANNELS * width; i++) sums[i] = 1 << (WEIGHT_BITS - 1);
        for (int tap = 0; tap < down.taps[y]; tap++) {
            const unsigned char *from =
                narrow + (size_t)CHANNELS * (down.first[y] + tap) * width;
            int weight = down.weights[y][tap];
            for (int i = 0; i < CHANNELS * width; i++) sums[i] += weight * from[i];
        }
        float *to = out + (size_t)CHANNELS * y * width;
        for (int i = 0; i < CHANNELS * width; i++) to[i] = rounded(sums[i]) * scale[i] + bias[i];
    }
    return 0;
}
