
void model_step_pixels(model_memory *memory, const uint8_t *pixels,
                       int32_t output[MODEL_OUTPUT_SIZE]) {
    int32_t c, pixel;
    for (c = 0; c < MODEL_INPUT_CHANNELS; c++)
        for (pixel = 0; pixel < INPUT_PIXELS; pixel++)
            memory->arena[INPUT_AT + pixel * INPUT_PITCH + c] =
                (uint32_t)(int32_t)model_pixel_code[c][*pixels++];
    qsnn_run_step(IMAGE, memory->state, memory->arena, output);
}
