package exchange

import (
	"slices"
	"testing"
)

func TestCells(t *testing.T) {
	next, names := 0, map[string]bool{}
	for _, counter := range Table() {
		for _, cell := range counter.Cells() {
			if cell.Index() != next {
				t.Fatalf("cell %d stands at %d", next, cell.Index())
			}
			next++
			if at := counter.At(cell.Places()...); at != cell {
				t.Fatalf("%v is %v by its places %v", cell, at, cell.Places())
			}
		}
		for _, metric := range []Metric{counter.Frontend, counter.Backend} {
			if metric.Name != "" && (names[metric.Name] || metric.Help == "") {
				t.Errorf("%s comes twice or says not what it is", metric.Name)
			}
			names[metric.Name] = true
		}
	}
	for _, places := range [][]int{{-1, ByPeer}, {1000, ByPeer}} {
		if at := Closed.At(places...); !slices.Equal(at.Places(), []int{0, ByPeer}) {
			t.Errorf("%v counts at %v", places, at.Places())
		}
	}
	if at := Answers.At(9999); Answers.Labels[0].Values[at.Places()[0]] != "other" {
		t.Errorf("9999 counts at %v", at.Places())
	}
}
