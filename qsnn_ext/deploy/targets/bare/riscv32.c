/* RISC-V, 32 bits, machine mode: start-up, a 16550 UART, and the test device of qemu's `virt`. */
#include "board.h"
#include "startup.h"

#define UART ((volatile uint8_t *)0x10000000u)
#define UART_STATUS 5
#define UART_READY 0x20u
#define TEST_DEVICE (*(volatile uint32_t *)0x100000u)

void board_write(const char *text) {
    for (; *text; text++) {
        while (!(UART[UART_STATUS] & UART_READY)) {}
        UART[0] = (uint8_t)*text;
    }
}

void board_exit(int status) {
    TEST_DEVICE = status ? (uint32_t)status << 16 | 0x3333u : 0x5555u;
    for (;;) {}
}

uint32_t board_flash_used(void) { return startup_flash_used(); }
uint32_t board_ram_used(void) { return startup_ram_used(); }
uint32_t board_stack_used(void) { return startup_stack_used(); }

uint32_t board_instructions(void) {
    uint32_t count;
    __asm__ volatile("csrr %0, minstret" : "=r"(count));
    return count;
}

static void on_trap(void) {
    board_write("trap: the core met something it cannot do\n");
    board_exit(70);
}

static __attribute__((used)) void start(uint32_t *stack_pointer) {
    __asm__ volatile("csrw mtvec, %0" : : "r"(on_trap));
    startup_memory(stack_pointer);
    board_exit(main());
}

void on_reset(void);
__attribute__((naked, used, section(".vectors"))) void on_reset(void) {
    __asm__ volatile("la sp, link_stack_top\n\t"
                     "mv a0, sp\n\t"
                     "j start");
}
