package harness

import (
	"bytes"
	"context"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Metrics are the samples of a /metrics page, by name.
type Metrics map[string][]sample

type sample struct {
	labels map[string]string
	value  float64
}

// Sum adds up a metric's samples that have the labels, given as name, value,
// name, value. It is 0 where there is none.
func (m Metrics) Sum(name string, labels ...string) float64 {
	var sum float64
next:
	for _, sample := range m[name] {
		for i := 0; i+1 < len(labels); i += 2 {
			if sample.labels[labels[i]] != labels[i+1] {
				continue next
			}
		}
		sum += sample.value
	}
	return sum
}

// Metrics reads the /metrics of a page.
func (f *Fleet) Metrics(page string) Metrics {
	f.TB.Helper()
	text, err := f.get(context.Background(), "http://"+page+"/metrics")
	if err != nil {
		f.TB.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		f.TB.Fatal(err)
	}
	metrics := make(Metrics)
	for name, family := range families {
		for _, metric := range family.GetMetric() {
			labels := make(map[string]string)
			for _, pair := range metric.GetLabel() {
				labels[pair.GetName()] = pair.GetValue()
			}
			// A sample has one of them, or a histogram, which Sum leaves out.
			number := metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + metric.GetUntyped().GetValue()
			metrics[name] = append(metrics[name], sample{labels, number})
		}
	}
	return metrics
}
