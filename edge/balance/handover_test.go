package balance

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// What is known of endpoints goes over to another process: verdicts of the same health
// check, ejections for the rest of their time, errors in a row.
func TestInherit(t *testing.T) {
	spec := static("sick:1", "out:1", "well:1", "best:1")
	after, most := uint32(3), uint32(100)
	spec.OutlierDetection = &resealv1.OutlierDetection{ConsecutiveErrors: &after, MaxEjectionPercent: &most, EjectionTime: durationpb.New(time.Minute)}
	spec.HealthCheck = &resealv1.HealthCheck{Path: "/up", ServerName: "name"}
	old, _ := balancer(nil)
	view := old.set(spec)
	sick, out, well := view.Endpoints()[0], view.Endpoints()[1], view.Endpoints()[2]
	streak := 0
	for range 3 {
		streak = old.judge(sick, view.rules.question, streak, errors.New("down"))
		old.Failed(out)
	}
	old.Failed(well)
	if !view.Unhealthy(sick) || !view.Ejected(out, time.Now()) {
		t.Fatal("the test does not do what it says")
	}
	data, err := json.Marshal(old.Health())
	if err != nil {
		t.Fatal(err)
	}
	inherited := func() (known map[string]Health) {
		if err := json.Unmarshal(data, &known); err != nil {
			t.Fatal(err)
		}
		return known
	}

	next, _ := balancer(nil)
	view = next.set(spec)
	next.Inherit(inherited())
	sick, out, well = view.Endpoints()[0], view.Endpoints()[1], view.Endpoints()[2]
	if !view.Unhealthy(sick) || view.Ejected(sick, time.Now()) {
		t.Error("the endpoint that fails its health check is not the same")
	}
	if !view.Ejected(out, time.Now()) || view.Ejected(out, time.Now().Add(time.Minute)) || view.Unhealthy(out) {
		t.Error("the ejected endpoint is not the same")
	}
	next.Failed(well)
	next.Failed(well)
	if !view.Ejected(well, time.Now()) {
		t.Error("errors in a row begin anew")
	}

	// Endpoints that come later, under another health check.
	spec.HealthCheck.Path = "/other"
	later, _ := balancer(nil)
	later.Inherit(inherited())
	view = later.set(spec)
	if view.Unhealthy(view.Endpoints()[0]) {
		t.Error("a verdict of another health check counts")
	}
	if !view.Ejected(view.Endpoints()[1], time.Now()) {
		t.Error("an ejection is lost")
	}
}
