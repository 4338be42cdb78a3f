/* What every board does before main: memory as C expects it, and a stack that shows its use. */
#ifndef STARTUP_H
#define STARTUP_H

#include <stdint.h>

/* From the linker script. */
extern uint32_t link_data_from[], link_data[], link_data_end[], link_bss[], link_bss_end[];
extern uint32_t link_stack[], link_stack_top[], link_flash[], link_ram[];

#define STACK_UNUSED 0xa5a5a5a5u

int main(void);

/* Without calls, which would write into the stack that is being painted. */
static inline void startup_memory(uint32_t *stack_pointer) {
    volatile uint32_t *to;
    const uint32_t *from = link_data_from;
    for (to = link_data; to < link_data_end; to++) *to = *from++;
    for (to = link_bss; to < link_bss_end; to++) *to = 0;
    for (to = link_stack; to < stack_pointer - 16; to++) *to = STACK_UNUSED;
}

static inline uint32_t startup_stack_used(void) {
    const uint32_t *at = link_stack;
    while (at < link_stack_top && *at == STACK_UNUSED) at++;
    return (uint32_t)((uintptr_t)link_stack_top - (uintptr_t)at);
}

static inline uint32_t startup_flash_used(void) {
    return (uint32_t)((uintptr_t)link_data_from - (uintptr_t)link_flash +
                      (uintptr_t)link_data_end - (uintptr_t)link_data);
}

static inline uint32_t startup_ram_used(void) {
    return (uint32_t)((uintptr_t)link_bss_end - (uintptr_t)link_ram);
}

#endif
