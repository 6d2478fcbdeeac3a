package exchange

import "testing"

func TestIdentity(t *testing.T) {
	for text, want := range map[Identity]IdentityParts{
		"g|10.0.0.1:443|app.test":          {Group: "g", Place: "10.0.0.1:443", ServerName: "app.test"},
		"g|pool uid|app.test|http/1.1":     {Group: "g", Place: "pool uid", ServerName: "app.test", HTTP1: true},
		"g|[2001:db8::1]:443|":             {Group: "g", Place: "[2001:db8::1]:443"},
		"other|[2001:db8::1]:443|app.test": {Group: "other", Place: "[2001:db8::1]:443", ServerName: "app.test"},
	} {
		parts, ok := text.Parts()
		if !ok || parts != want || want.Identity() != text {
			t.Errorf("%q: %+v %t, and back %q", text, parts, ok, want.Identity())
		}
		if text.Group() != want.Group || text.Place() != want.Place {
			t.Errorf("%q: group %q, place %q", text, text.Group(), text.Place())
		}
		want.Group = "next"
		if moved := text.Moved("next"); moved != want.Identity() {
			t.Errorf("%q moved: %q", text, moved)
		}
	}
	for _, text := range []Identity{"", "g", "g|a", "g|a|b|h2", "g|a|b|http/1.1|", "g|a|b|c|http/1.1"} {
		if parts, ok := text.Parts(); ok {
			t.Errorf("%q has parts: %+v", text, parts)
		}
	}
}
