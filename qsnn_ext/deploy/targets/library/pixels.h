
/* Input code of every 8-bit pixel: that of (pixel / 255 - mean) / std. */
extern const int16_t model_pixel_code[MODEL_INPUT_CHANNELS][256];

/* Runs one time step on 8-bit pixels [channel][row][column]. */
void model_step_pixels(model_memory *memory, const uint8_t *pixels,
                       int32_t output[MODEL_OUTPUT_SIZE]);
