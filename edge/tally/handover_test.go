package tally

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func reportOf(t *Tally) *resealv1.ReportRequest {
	report := t.Report("e", "boot", 0)
	report.Time = nil
	return report
}

// TestKeysAreUnique: a number goes over by its key.
func TestKeysAreUnique(t *testing.T) {
	size := 0
	for _, counter := range exchange.Table() {
		if counter.Key == "" {
			t.Errorf("a counter has no key: %+v", counter.Frontend)
		}
		size += len(counter.Cells())
	}
	if len(cellsByKey) != size {
		t.Errorf("%d keys of %d numbers", len(cellsByKey), size)
	}
}

// TestInheritance goes on with the counters of a process that still counts, over two
// processes, and ends with their sum.
func TestInheritance(t *testing.T) {
	one, two, three := New(nil), New(nil), New(nil)
	fill(one)
	second, third := two.Inherit(), three.Inherit()
	take := func(i *Inheritance, from *Tally) {
		t.Helper()
		if err := i.Take(from.Export()); err != nil {
			t.Fatal(err)
		}
	}
	take(second, one)
	if diff := cmp.Diff(reportOf(one), reportOf(two), protocmp.Transform()); diff != "" {
		t.Fatalf("the successor counts something else (-want +got):\n%s", diff)
	}
	fill(two)
	take(third, two)
	fill(one) // it drains
	fill(three)
	take(second, one)
	take(third, two)
	take(third, two) // nothing new
	want := New(nil)
	for range 4 {
		fill(want)
	}
	if diff := cmp.Diff(reportOf(want), reportOf(three), protocmp.Transform()); diff != "" {
		t.Fatalf("the sum differs (-want +got):\n%s", diff)
	}
	second.End()
	take(third, two)
	third.End()
	if got, want := reportOf(three).GetPools()[0].GetConnections(), reportOf(want).GetPools()[0].GetConnections(); got.GetActive() != want.GetActive()/4 || got.GetOpened() != want.GetOpened() {
		t.Errorf("after the end %v, before it %v", got, want)
	}
}

// TestInheritanceOfWhatIsGone does not bring back what the configuration dropped.
func TestInheritanceOfWhatIsGone(t *testing.T) {
	one, two := New(nil), New(nil)
	fill(one)
	inheritance := two.Inherit()
	if err := inheritance.Take(one.Export()); err != nil {
		t.Fatal(err)
	}
	two.Forget(nil, nil)
	fill(one)
	if err := inheritance.Take(one.Export()); err != nil {
		t.Fatal(err)
	}
	if report := reportOf(two); len(report.GetPools())+len(report.GetListeners()) != 0 {
		t.Errorf("%v", report)
	}
	if err := inheritance.Take([]byte(`{"pools":{"p":{"cells":{"of/another/release":1,"opened":2}}}}`)); err != nil || reportOf(two).GetPools()[0].GetConnections().GetOpened() != 2 {
		t.Error(err, reportOf(two))
	}
	if inheritance.Take([]byte("{")) == nil {
		t.Error("no error")
	}
}
