/* Decodes a window of a JPEG with bare libjpeg-turbo: an upper bound on the speed of a loader. */
#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>

struct guard {
    struct jpeg_error_mgr manager;
    jmp_buf caller;
};

static void leave(j_common_ptr info) { longjmp(((struct guard *)info->err)->caller, 1); }
static void be_silent(j_common_ptr info) { (void)info; }

/* window: top, left, bottom, right, inside the image. pixels: has room for 4 bytes per pixel of the
 * whole image. Returns 0, or 1 if libjpeg rejects the data. */
int decode_window(const unsigned char *data, unsigned long nbytes, const int *window,
                  unsigned char *pixels) {
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
    JDIMENSION left = window[1] < (int)info.output_width ? window[1] : 0;
    JDIMENSION bottom = window[2] < (int)info.output_height ? window[2] : info.output_height;
    JDIMENSION right = window[3] < (int)info.output_width ? window[3] : info.output_width;
    JDIMENSION width = right - left;
    jpeg_crop_scanline(&info, &left, &width); /* widened to whole blocks */
    jpeg_skip_scanlines(&info, top);
    while (info.output_scanline < bottom) {
        JSAMPROW row = pixels;
        jpeg_read_scanlines(&info, &row, 1);
        pixels += (size_t)info.output_width * info.output_components;
    }
    jpeg_abort_decompress(&info);
    jpeg_destroy_decompress(&info);
    return 0;
}
