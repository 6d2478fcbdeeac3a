package failures

import (
	"fmt"
	"testing"

	"go.uber.org/goleak"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ids(report *resealv1.FailuresReport) (all []string) {
	for _, f := range report.GetFailures() {
		all = append(all, f.GetRequestId())
	}
	return all
}

// The newest are kept, in order, and told by what they were asked for.
func TestRing(t *testing.T) {
	var r Ring
	if got := r.Report(&resealv1.FailuresOrder{Id: 7, Limit: 10}); got.GetId() != 7 || len(got.GetFailures()) != 0 {
		t.Errorf("empty: %v", got)
	}
	for i := range 3*Size + 5 {
		r.Note(&resealv1.Failure{RequestId: fmt.Sprint(i), Pool: fmt.Sprint("p", i%2), Listener: fmt.Sprint("l", i%3)})
	}
	last := 3*Size + 4
	if got := ids(r.Report(&resealv1.FailuresOrder{Limit: 1000})); len(got) != Size || got[0] != fmt.Sprint(last-Size+1) || got[Size-1] != fmt.Sprint(last) {
		t.Errorf("%d: %v", len(got), got)
	}
	if got := ids(r.Report(&resealv1.FailuresOrder{Limit: 2, Pool: "p0"})); fmt.Sprint(got) != fmt.Sprint([]string{fmt.Sprint(last - 2), fmt.Sprint(last)}) {
		t.Errorf("of a pool: %v", got)
	}
	for _, f := range r.Report(&resealv1.FailuresOrder{Limit: 1000, Pool: "p1", Listener: "l2"}).GetFailures() {
		if f.GetPool() != "p1" || f.GetListener() != "l2" {
			t.Errorf("of a pool and a listener: %v", f)
		}
	}
	if got := ids(r.Report(&resealv1.FailuresOrder{})); len(got) != 0 {
		t.Errorf("none asked for: %v", got)
	}
}
