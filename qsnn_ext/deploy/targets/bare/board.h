/* What main.c needs of a board: one file implements it per kind of core. */
#ifndef BOARD_H
#define BOARD_H

#include <stdint.h>

void board_write(const char *text);

/* Instructions since the board started. The emulators count them when asked to (qemu's
 * `-icount shift=0`); hardware would count cycles here. */
uint32_t board_instructions(void);

/* Bytes of flash and RAM that the firmware takes, its samples included, its stack not. */
uint32_t board_flash_used(void);
uint32_t board_ram_used(void);

/* Most bytes of stack that were in use since the board started. */
uint32_t board_stack_used(void);

/* Ends the emulation; on hardware, stays here. */
void board_exit(int status);

#endif
