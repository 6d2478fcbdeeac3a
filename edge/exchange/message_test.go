package exchange

import (
	"slices"
	"testing"
)

func TestFields(t *testing.T) {
	fields := Fields{{Name: "Host", Value: "a"}, {Name: "x-a", Value: "1", Secret: true}, {Name: "Y", Value: "2"}, {Name: "X-A", Value: "3"}}
	if got := slices.Collect(fields.Values("X-a")); !slices.Equal(got, []string{"1", "3"}) {
		t.Errorf("X-a: %q", got)
	}
	fields.Set("X-A", "4")
	fields.Set("Z", "5")
	fields.Del("HOST")
	if want := (Fields{{Name: "x-a", Value: "4", Secret: true}, {Name: "Y", Value: "2"}, {Name: "Z", Value: "5"}}); !slices.Equal(fields, want) {
		t.Errorf("%v, want %v", fields, want)
	}
	if fields.Get("y") != "2" || fields.Get("none") != "" || !fields.Has("z") || fields.Has("host") {
		t.Errorf("%v", fields)
	}
}
