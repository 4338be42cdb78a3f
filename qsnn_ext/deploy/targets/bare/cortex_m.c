/* Arm Cortex-M: vectors, start-up, and the debugger's semihosting for output.
 *
 * On hardware without a debugger attached the semihosting breakpoints stop the core: replace
 * board_write by the board's UART and board_exit by an endless loop. */
#include "board.h"
#include "startup.h"

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYSTICK_CONTROL REGISTER(0xe000e010u)
#define SYSTICK_RELOAD REGISTER(0xe000e014u)
#define SYSTICK_VALUE REGISTER(0xe000e018u)
#define COPROCESSORS REGISTER(0xe000ed88u)
#define SYSTICK_PERIOD 0x1000000u

/* Instructions per tick of the core's clock when an instruction takes one nanosecond, as a
 * fraction: 40 at 25 MHz, 31.25 at 32 MHz. */
#ifndef TICK_NUMERATOR
#error "the Makefile gives the board's TICK_NUMERATOR and TICK_DENOMINATOR"
#endif

static volatile uint32_t wraps;

static int semihosting(int operation, const void *argument) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

void board_write(const char *text) { semihosting(0x04, text); }

void board_exit(int status) {
    const uint32_t stopped_by_itself[2] = {0x20026u, (uint32_t)status};
    semihosting(0x20, stopped_by_itself);
    for (;;) {}
}

uint32_t board_flash_used(void) { return startup_flash_used(); }
uint32_t board_ram_used(void) { return startup_ram_used(); }
uint32_t board_stack_used(void) { return startup_stack_used(); }

uint32_t board_instructions(void) {
    uint32_t before, ticks;
    do {
        before = wraps;
        ticks = SYSTICK_PERIOD - SYSTICK_VALUE;
    } while (before != wraps);
    return (before * SYSTICK_PERIOD + ticks) / TICK_DENOMINATOR * TICK_NUMERATOR;
}

static void on_systick(void) { wraps++; }

static void on_fault(void) {
    board_write("fault: the core met something it cannot do\n");
    board_exit(70);
}

void on_reset(void);
void on_reset(void) {
    uint32_t *stack_pointer;
    __asm__ volatile("mov %0, sp" : "=r"(stack_pointer));
    COPROCESSORS |= 0xfu << 20; /* floating point and vectors, where there are any */
    __asm__ volatile("dsb\n\tisb" : : : "memory");
    startup_memory(stack_pointer);
    SYSTICK_RELOAD = SYSTICK_PERIOD - 1;
    SYSTICK_VALUE = 0;
    SYSTICK_CONTROL = 7; /* the core's clock, with interrupts */
    while (SYSTICK_VALUE == 0) {} /* until its first tick */
    board_exit(main());
}

typedef union {
    uint32_t *stack;
    void (*handler)(void);
} vector;

__attribute__((section(".vectors"), used)) static const vector vectors[16] = {
    {.stack = link_stack_top}, {.handler = on_reset}, {.handler = on_fault}, {.handler = on_fault},
    {.handler = on_fault}, {.handler = on_fault}, {.handler = on_fault}, {.handler = on_fault},
    {.handler = on_fault}, {.handler = on_fault}, {.handler = on_fault}, {.handler = on_fault},
    {.handler = on_fault}, {.handler = on_fault}, {.handler = on_fault}, {.handler = on_systick},
};
