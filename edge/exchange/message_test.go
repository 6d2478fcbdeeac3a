package exchange

import (
	"slices"
	"testing"
)

func TestFields(t *testing.T) {
	fields := Fields{{"Host", "a"}, {"x-a", "1"}, {"Y", "2"}, {"X-A", "3"}}
	if got := slices.Collect(fields.Values("X-a")); !slices.Equal(got, []string{"1", "3"}) {
		t.Errorf("X-a: %q", got)
	}
	fields.Set("X-A", "4")
	fields.Set("Z", "5")
	fields.Del("HOST")
	if want := (Fields{{"x-a", "4"}, {"Y", "2"}, {"Z", "5"}}); !slices.Equal(fields, want) {
		t.Errorf("%q, want %q", fields, want)
	}
	if fields.Get("y") != "2" || fields.Get("none") != "" || !fields.Has("z") || fields.Has("host") {
		t.Errorf("%q", fields)
	}
}
