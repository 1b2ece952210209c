// Renders templates with Go's own text/template, called as Ollama calls it: reads JSON lines of template and messages
// from standard input, writes one JSON string a line.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type request struct {
	Template string     `json:"template"`
	Messages []*message `json:"messages"`
}

func values(request request) map[string]any {
	var system []string
	var joined []*message
	prompt := ""
	for _, next := range request.Messages {
		switch next.Role {
		case "system":
			system = append(system, next.Content)
		case "user":
			prompt = next.Content
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == next.Role {
			joined[last].Content += "\n\n" + next.Content
			continue
		}
		joined = append(joined, next)
	}
	return map[string]any{"System": strings.Join(system, "\n\n"), "Messages": joined, "Prompt": prompt, "Response": ""}
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var request request
		if err := json.Unmarshal(lines.Bytes(), &request); err != nil {
			panic(err)
		}
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(request.Template))
		var text strings.Builder
		if err := parsed.Execute(&text, values(request)); err != nil {
			panic(err)
		}
		if err := out.Encode(text.String()); err != nil {
			panic(err)
		}
	}
}
