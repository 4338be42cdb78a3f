// Runs the bundled samples again and again and prints what the network says of each.
#include <model.h>
#include "samples.h"

static model_memory memory;

void setup() {
  Serial.begin(115200);
  while (!Serial) {
  }
  if (model_start(&memory) != 0) Serial.println("runtime and constants are of different versions");
}

void loop() {
  int64_t sums[MODEL_OUTPUT_SIZE];
  for (int i = 0; i < SAMPLES; i++) {
    const uint32_t start = micros();
    model_sum(&memory, samples[i], SAMPLE_STRIDE, sums);
    const uint32_t took = micros() - start;
    Serial.print("sample ");
    Serial.print(i);
    Serial.print(": class ");
    Serial.print(static_cast<long>(model_largest(sums)));
    Serial.print(", microseconds ");
    Serial.println(static_cast<unsigned long>(took));
  }
  delay(2000);
}
